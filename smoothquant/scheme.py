"""The quantization scheme: one record of all that is INT8. Exporters write it into manifests, and validation reads it.

    weights      int8, one static scale per output channel or per matrix            (linears of the layers)
    activations  int8, one dynamic scale per token or one static scale per tensor   (their inputs)
    kv_cache     int8, one static scale for the keys of a layer and one for the values, or one for both
    head         int8 weights per output channel, activations per token             (the output head)
    embedding    int8, one static scale per row, that is per token of the vocabulary  (the embedding's table)

Each of them may be float. Linears that stay in float beside quantized ones are listed by name. The tables of presets
are the only list of choices; the options of the command line offer their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smoothquant.errors import UserError


@dataclass(frozen=True)
class Precision:
    """The precision of one kind of tensor. granularity: the numbers that share a scale. static: whether the scale is
    stored, instead of computed at run time."""

    dtype: str
    granularity: str
    static: bool

    @property
    def quantized(self) -> bool:
        """Whether the dtype is not float."""
        return self.dtype != "float"

    @property
    def form(self) -> str:
        """The granularity, or "float", as the command line spells it."""
        return self.granularity if self.dtype == "int8" else self.dtype


FLOAT = Precision("float", "none", static=False)
WEIGHTS = {
    "float": FLOAT,
    "per-channel": Precision("int8", "per-channel", static=True),
    "per-tensor": Precision("int8", "per-tensor", static=True),
}
ACTIVATIONS = {
    "per-token": Precision("int8", "per-token", static=False),
    "per-tensor": Precision("int8", "per-tensor", static=True),
    "float": FLOAT,
}
CACHES = {"float": FLOAT, "int8": Precision("int8", "per-tensor", static=True)}  # keys and values have a scale each
SHARED_CACHES = {"float": FLOAT, "int8": Precision("int8", "per-layer", static=True)}  # they share one scale
HEADS = {"float": FLOAT, "int8": Precision("int8", "per-channel", static=True)}
EMBEDDINGS = {"float": FLOAT, "int8": Precision("int8", "per-row", static=True)}
KNOWN: Mapping[str, Mapping[str, Precision]] = {
    "weights": WEIGHTS,
    "activations": ACTIVATIONS,
    "kv_cache": CACHES | {"int8-shared": SHARED_CACHES["int8"]},
    "head": HEADS,
    "embedding": EMBEDDINGS,
}


@dataclass(frozen=True)
class Scheme:
    """The quantization scheme of one engine. float_linears: the module names of linears that stay in float.

    Raises UserError for a combination that no engine of ours has.
    """

    weights: Precision
    activations: Precision
    kv_cache: Precision = FLOAT
    head: Precision = FLOAT
    embedding: Precision = FLOAT
    float_linears: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, known in KNOWN.items():
            found = getattr(self, name)
            if found not in known.values():
                forms = ", ".join(precision.form for precision in known.values())
                raise UserError(f"quantization scheme: {name} {found.form!r}", expected=f"one of {forms}")
        if self.weights.quantized != self.activations.quantized:
            raise UserError(
                f"quantization scheme: {self.weights.form} weights with {self.activations.form} activations",
                expected="both in INT8 or both in float",
            )

    @property
    def quantized(self) -> bool:
        """Whether the linears of the layers are quantized."""
        return self.weights.quantized

    @property
    def head_activations(self) -> Precision:
        """The precision of the output head's input."""
        return ACTIVATIONS["per-token"] if self.head.quantized else FLOAT

    def words(self) -> dict[str, str | list[str]]:
        """The scheme in words for reports, by part."""
        told: dict[str, str | list[str]] = {"activations": self.activations.form, "weights": self.weights.form}
        told |= {"kv_cache": self.kv_cache.dtype, "head": self.head.dtype}
        told |= {"embedding": self.embedding.dtype} if self.embedding.quantized else {}
        return told | ({"float_linears": list(self.float_linears)} if self.float_linears else {})


def scheme_of(
    activations: str,
    weights: str = "per-channel",
    kv_cache: str = "float",
    head: str = "float",
    embedding: str = "float",
    float_linears: tuple[str, ...] = (),
) -> Scheme:
    """The scheme with the presets of these names. Float activations imply float weights.

    Raises UserError for an unknown name.
    """
    names = {
        "weights": "float" if activations == "float" else weights,
        "activations": activations,
        "kv_cache": kv_cache,
        "head": head,
        "embedding": embedding,
    }
    for part, name in names.items():
        if name not in KNOWN[part]:
            raise UserError(f"{part} {name!r}", expected=f"one of {', '.join(KNOWN[part])}")
    return Scheme(**{part: KNOWN[part][name] for part, name in names.items()}, float_linears=float_linears)


def quantized_names(presets: Mapping[str, Precision]) -> tuple[str, ...]:
    """The names of a table's presets, without the float one."""
    return tuple(name for name, precision in presets.items() if precision.quantized)


IN_FLOAT = scheme_of("float")
PER_TOKEN = scheme_of("per-token")  # the default scheme
PER_TENSOR = scheme_of("per-tensor")
