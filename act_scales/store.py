"""The act scales file.

safetensors; keys are Hugging Face module names:

    <linear>.input_absmax     float32 (in,)    max |input| per channel
    <linear>.output_absmax    float32 (out,)   max |output| per channel
    <linear>.input_mean_square  float32 (in,)  mean input^2 per channel, see `act_scales.mean_squares`
    <layer>.held_absmax       float32 (1,)     max |residual stream| and |branch|: what float16 may be too small for
    lm_head.held_absmax       float32 (1,)     max |what the head reads|, and a bound on the |logits|
    metadata (strings)        sha256 over all the rest, format_version, model_fingerprint, text_fingerprint,
                              text_source, samples, sequence_length, sequence_start, tokens, dtype, device,
                              versions (JSON); published scales also have: source, source_file, source_commit

Format 2 has no `input_mean_square`, and is read as it is. Format 1 has neither `held_absmax` nor a digest, and is
refused. The same content gives the same bytes. The form published with SmoothQuant is read and written too: a `.pt`
file holding a dict of module name -> max |input| (in,). It is loaded as data; a pickle that wants to run code is
refused.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smoothquant import float16
from smoothquant.errors import ActScalesError, OutputError, UserError, raise_refusal
from smoothquant.files import write_bytes
from smoothquant.model import Model
from smoothquant.ranges import check_act_scales

FORMAT_VERSION = "3"
READ_VERSIONS = ("2", FORMAT_VERSION)
AGAIN = "copy it again, or calibrate again"
INPUT, OUTPUT, HELD, MEAN_SQUARE = ".input_absmax", ".output_absmax", ".held_absmax", ".input_mean_square"
ROUNDING = 1e-4  # a mean square may exceed the square of its maximum by this share, which is above float32's rounding
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, eq=False)
class ActScales:
    """Per-channel maxima of one model's linears, by module name.

    input_absmax: float32 (in,), max |input|; output_absmax: float32 (out,), max |output|, empty for the published form.
    metadata: what the scales were made from; empty for the published form.
    held_absmax: float32 (1,) of every layer and of the head, see `smoothquant.float16`; empty where it is not known.
    input_mean_square: float32 (in,) of every linear, see `act_scales.mean_squares`; empty where it is not known.
    Raises ActScalesError unless every entry is a vector of finite, non-negative float32 numbers, and the mean squares
    belong to the maxima.
    """

    input_absmax: Mapping[str, Tensor]
    output_absmax: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    held_absmax: Mapping[str, Tensor] = field(default_factory=dict)
    input_mean_square: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.input_absmax:
            raise ActScalesError("no activation scales in it", expected=f"tensors named <linear>{INPUT}")
        for name, values in self.tensors().items():
            if values.dim() != 1 or values.dtype != torch.float32:
                kind = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
                raise ActScalesError(f"{name} is {kind}", expected="a vector of float32, one number per channel")
            if not (values.isfinite() & (values >= 0)).all():
                raise ActScalesError(f"{name} holds NaN, Inf or negative values", expected="maxima of magnitudes")
            if name.endswith(HELD) and len(values) != 1:
                raise ActScalesError(f"{name} has {len(values)} numbers", expected="one, of all channels")
        if self.input_mean_square:
            self._check_mean_squares()

    def _check_mean_squares(self) -> None:
        for name in sorted(self.input_absmax.keys() ^ self.input_mean_square.keys()):
            missing = MEAN_SQUARE if name in self.input_absmax else INPUT
            raise ActScalesError(f"{name}{missing} is missing", expected="a mean square for every maximum, or none")
        for name, values in self.input_mean_square.items():
            absmax = self.input_absmax[name].double()
            if len(values) != len(absmax) or (values > absmax.square() * (1 + ROUNDING)).any():
                raise ActScalesError(
                    f"{name}{MEAN_SQUARE} does not belong to {name}{INPUT}",
                    expected="as many channels, each with a mean square of at most the square of its maximum",
                )

    def tensors(self) -> dict[str, Tensor]:
        """All vectors under their keys in the file, sorted."""
        found = {name + INPUT: values for name, values in self.input_absmax.items()}
        found |= {name + OUTPUT: values for name, values in self.output_absmax.items()}
        found |= {name + HELD: values for name, values in self.held_absmax.items()}
        found |= {name + MEAN_SQUARE: values for name, values in self.input_mean_square.items()}
        return dict(sorted(found.items()))

    @property
    def zero(self) -> tuple[str, ...]:
        """Linears that saw nothing but zeros."""
        return tuple(name for name, values in self.input_absmax.items() if not values.any())

    @property
    def silent(self) -> tuple[str, ...]:
        """Modules with linears that saw nothing but zeros: experts that no token of the calibration reached."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.zero))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and values, 16 hex digits. It does not depend on the metadata."""
        return self._values_digest()[:16]

    def _digest(self) -> str:
        """SHA-256 over names, values and metadata, 64 hex digits."""
        text = json.dumps([self._values_digest(), sorted(self.metadata.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def _values_digest(self) -> str:
        """SHA-256 over names and values, 64 hex digits."""
        digest = hashlib.sha256()
        for name, values in self.tensors().items():
            digest.update(f"{name} {len(values)} ".encode() + _bytes(values))
        return digest.hexdigest()

    def for_model(self, model: Model) -> ActScales:
        """The part of these scales that belongs to the linears of `model` that get quantized.

        Scales of linears that stay in float (lm_head, routers) are dropped. Names become this model's: they may have
        one prefix more or less than its own ("model.decoder.layers..." and "decoder.layers..."). Raises ActScalesError
        if the scales were made from a model with another fingerprint, if a linear has no scales or scales of another
        length, or if this model lacks a linear that has scales.
        """
        theirs = self.metadata.get("model_fingerprint")
        if theirs and theirs != (ours := model.checkpoint.fingerprint):
            raise ActScalesError(
                f"activation scales of another model (fingerprint {theirs})",
                expected=f"those of {model.checkpoint.folder} (fingerprint {ours})",
                do="calibrate this model: smoothquant calibrate MODEL --text FILE --out SCALES",
            )
        linears, dropped = dict(model.linears()), model.float_linears()
        inputs, outputs, squares = (
            {name: values for name, values in _named_like(linears, known).items() if name not in dropped}
            for known in (self.input_absmax, self.output_absmax, self.input_mean_square)
        )
        check_act_scales(model, inputs)
        for name, values in outputs.items():
            if name not in linears:
                raise ActScalesError(f"activation scales for {name}, which this model does not have")
            if len(values) != linears[name][0]:
                raise ActScalesError(f"{name}{OUTPUT} has {len(values)} channels", expected=f"{linears[name][0]}")
        places = dict.fromkeys((*float16.layers(model), model.family.lm_head))
        held = _named_like(places, self.held_absmax) if self.held_absmax else {}
        if held and held.keys() != places.keys():
            odd = sorted(held.keys() ^ places.keys())[0]
            raise ActScalesError(
                f"{odd}{HELD} is {'missing' if odd in places else 'not part of this model'}",
                expected="one for each of its layers and for its head, or none at all",
                do="calibrate this model: smoothquant calibrate MODEL --text FILE --out SCALES",
            )
        return replace(self, input_absmax=inputs, output_absmax=outputs, held_absmax=held, input_mean_square=squares)

    def stamped(self, model: Model) -> ActScales:
        """`for_model`, with the model's fingerprint in the metadata, so that every other model refuses these scales."""
        stamp = {"format_version": FORMAT_VERSION, "model_fingerprint": model.checkpoint.fingerprint}
        return replace(self.for_model(model), metadata={**self.metadata, **stamp})

    def save(self, path: str | Path) -> None:
        """Write the safetensors form, whole or not at all. Raises OutputError, or OSError when the disk is full."""
        metadata = {**self.metadata, "sha256": self._digest()}
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        start = 0
        for name, values in self.tensors().items():
            end = start + 4 * len(values)
            header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, end]}
            start = end
        # safetensors' own writer is not used: it puts the metadata in another order at every run
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        body = [_bytes(values) for values in self.tensors().values()]
        _write(Path(path), b"".join([struct.pack("<Q", len(head)), head, *body]))

    def save_pt(self, path: str | Path) -> None:
        """Write the published form, which has input maxima only, whole or not at all. Raises what `save` raises."""
        buffer = io.BytesIO()
        torch.save({name: values.clone() for name, values in self.input_absmax.items()}, buffer)
        _write(Path(path), buffer.getvalue())


def load_act_scales(path: str | Path) -> ActScales:
    """Act scales of a `.safetensors` file or a published `.pt`. Raises ActScalesError, which names file and fault."""
    path = Path(path)
    if not path.is_file():
        raise ActScalesError(f"{path}: no such file", expected="act scales made by smoothquant calibrate, or a .pt")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        if path.suffix == ".pt":
            return _load_pt(path)
    except ActScalesError as error:
        raise ActScalesError(f"{path}: {error.what}", expected=error.expected, do=error.do) from error
    raise ActScalesError(f"{path}: unknown kind of file", expected="act scales as .safetensors or .pt")


def _load_safetensors(path: Path) -> ActScales:
    found: dict[str, dict[str, Tensor]] = {INPUT: {}, OUTPUT: {}, HELD: {}, MEAN_SQUARE: {}}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("format_version", FORMAT_VERSION)
            if version not in READ_VERSIONS:
                do = (
                    "make the file again: smoothquant calibrate or scales import"
                    if version == "1"
                    else "update this tool"
                )
                raise ActScalesError(f"format version {version}", expected=" or ".join(READ_VERSIONS), do=do)
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                name, dot, last = key.rpartition(".")
                if dot + last not in found:
                    expected = f"only act scales: <linear>{INPUT}, {OUTPUT}, {MEAN_SQUARE}, and <layer>{HELD}"
                    raise ActScalesError(f"unknown tensor {key}", expected=expected)
                found[dot + last][name] = file.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise_refusal(error, path)
        raise ActScalesError(f"truncated or corrupt ({error})", do=AGAIN) from error
    told = {key: value for key, value in metadata.items() if key != "sha256"}
    scales = ActScales(found[INPUT], found[OUTPUT], told, found[HELD], found[MEAN_SQUARE])
    if metadata and metadata.get("sha256") != scales._digest():
        raise ActScalesError(
            "its content is not what was written", expected="values that its own SHA-256 belongs to", do=AGAIN
        )
    return scales


def _load_pt(path: Path) -> ActScales:
    expected = "the published form: a dict of module name -> tensor, nothing else"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, and advises to run the file's code
        raise_refusal(error, path)
        raise ActScalesError("corrupt, or it holds code, which was not run", expected=expected) from error
    if not isinstance(loaded, dict):
        raise ActScalesError(f"holds a {type(loaded).__name__}", expected=expected)
    for name, values in loaded.items():
        if not isinstance(name, str) or not isinstance(values, Tensor):
            raise ActScalesError(f"entry {name!r} is a {type(values).__name__}", expected=expected)
    # published in float16 and float32
    return ActScales(
        {name: values.detach().float() if values.is_floating_point() else values for name, values in loaded.items()}
    )


def _named_like(linears: Mapping[str, object], maxima: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`maxima` by the names in `linears`, if removing or adding one prefix makes them so; else `maxima` as it is."""
    first = next(iter(linears))
    longer = [name.removesuffix(first) for name in maxima if name.endswith(f".{first}")]
    shorter = [first.removesuffix(name) for name in maxima if first.endswith(f".{name}")]
    if first in maxima or len(longer + shorter) != 1:
        return dict(maxima)
    if longer:
        return {name.removeprefix(longer[0]): values for name, values in maxima.items()}
    return {shorter[0] + name if shorter[0] + name in linears else name: values for name, values in maxima.items()}


def _bytes(values: Tensor) -> bytes:
    return values.numpy().astype("<f4").tobytes()


def check_replaceable(path: Path) -> None:
    """Raise OutputError for a file that this tool did not write. Published scales (.pt) carry no mark of ours: only a
    file that holds nothing else than act scales may be replaced."""
    try:
        scales = load_act_scales(path)
        ours = path.suffix == ".pt" or "format_version" in scales.metadata
    except UserError:
        ours = path.suffix == ".safetensors" and _has_our_header(path)
    if not ours or path.is_symlink():
        raise OutputError(
            f"{path} exists, and it is no act scales file of this tool",
            expected="a new file, or act scales to be replaced",
            do="choose another --out, or move it away",
        )


def _has_our_header(path: Path) -> bool:
    """Whether a file, damaged perhaps, holds act scales by its header."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return "format_version" in (file.metadata() or {}) and all(
                name.endswith((INPUT, OUTPUT, HELD, MEAN_SQUARE)) for name in names
            )
    except (SafetensorError, OSError):
        return False


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes(path, content)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise OutputError(
            f"{path}: cannot write there ({error.strerror})",
            expected="a writable place",
            do="choose another --out",
        ) from error
