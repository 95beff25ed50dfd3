"""The manifest of an output folder: the step that made it, its inputs and its results.

{"format", "step", "inputs", "files", "versions", "contract", "geometry", "results", "sha256"}

files     name -> {"size", "sha256", "accepted"}
sha256    of all the rest (`artifacts.seal`)
inputs    for an export an `Origin`; for a build a record of the builder's, whose key "export" holds the origin of the
          export
contract  the change of the model's logits by smoothing; in exports and engines
geometry  the numbers of the model that an engine needs; in exports and engines
results   the other results of the step, a record of the step's
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Annotated, Any, TypeVar

from smoothquant.artifacts.record import DO, as_json, read
from smoothquant.config_keys import FEW, LAYERS, POSITIONS, SIZE
from smoothquant.errors import UserError
from smoothquant.scheme import Scheme
from smoothquant.settings import SmoothingSettings

T = TypeVar("T")
FIRST = ("model", "act_scales", "plan", "family", "max_positions")  # fields that reports show first


@dataclass(frozen=True)
class Promise:
    """The result of the smoothing contract: the relative error of the logits on a few tokens, and its tolerance."""

    logits_relative_error: float
    tolerance: float


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of a model. cache_window: the number of newest keys that any layer reads; None for all keys."""

    hidden_size: Annotated[int, SIZE]
    layers: Annotated[int, LAYERS]
    heads: Annotated[int, FEW]
    kv_heads: Annotated[int, FEW]
    head_dim: Annotated[int, FEW]
    vocab_size: Annotated[int, SIZE]
    max_positions: Annotated[int, POSITIONS]
    cache_window: Annotated[int, POSITIONS] | None


@dataclass(frozen=True)
class OnnxOptions:
    """The options of an ONNX graph. body: "fp32", "fp16" or "bf16", the dtype of everything that is not INT8. capacity:
    the tokens of a cache that is written in place; None for a cache that grows."""

    body: str
    opset: int
    capacity: Annotated[int, POSITIONS] | None = None


@dataclass(frozen=True)
class TrtllmOptions:
    """The options of a TensorRT-LLM checkpoint. tp, pp: the numbers of ranks of tensor and pipeline parallelism.
    trtllm_version: the version that will build the engine."""

    quant_algo: str
    dtype: str
    tp: Annotated[int, FEW]
    pp: Annotated[int, FEW]
    trtllm_version: str


@dataclass(frozen=True)
class HuggingFaceOptions:
    """The options of a float checkpoint. dtype: the dtype of its weights, or "as stored"."""

    dtype: str


@dataclass(frozen=True)
class Origin:
    """What an export was made from. model, sidecars, act_scales, plan: fingerprints, None where there were none.

    sidecars: of config.json, tokenizer and generation settings, which the export holds too.

    schemes: of its graphs; one, but for an ONNX export that holds two. steps: what was done to layers between smoothing
    and storing (`smoothquant.steps`). max_positions: the length whose rotary frequencies were chosen, where a model has
    several. onnx, trtllm, hf: options of the format.
    """

    family: str
    smoothing: SmoothingSettings
    schemes: tuple[Scheme, ...]
    steps: tuple[Mapping[str, Any], ...] = ()
    model: str | None = None
    sidecars: str | None = None
    act_scales: str | None = None
    plan: str | None = None
    max_positions: int | None = None
    onnx: OnnxOptions | None = None
    trtllm: TrtllmOptions | None = None
    hf: HuggingFaceOptions | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme of the only graph, or of the first."""
        return self.schemes[0]

    def words(self) -> dict[str, Any]:
        """The fields as words for reports, by name. Usual values are left out."""
        told: dict[str, Any] = dict.fromkeys(FIRST)
        for name, value in vars(self).items():
            told |= self._words(name, value)
        return {key: value for key, value in told.items() if value is not None}

    def _words(self, name: str, value: Any) -> dict[str, Any]:
        """The words for one field, by name."""
        if name == "schemes":
            return self.scheme.words()
        if name == "smoothing":
            return {name: self.smoothing_words()}
        if name == "steps":
            return {name: [" ".join(_step_words(step)) for step in value] or None}
        return as_json(value) if is_dataclass(value) else {name: value}

    def smoothing_words(self) -> dict[str, Any]:
        """The smoothing settings as words. The alphas of a plan are its own."""
        return {key: value for key, value in self.smoothing.words().items() if key != "alpha" or self.plan is None}

    def only(self, scheme: Scheme) -> Origin:
        """The origin of the one graph with this scheme."""
        return replace(self, schemes=(scheme,))


def _step_words(step: Mapping[str, Any]) -> Iterator[str]:
    """Yield the name of a step, then each of its numbers with its name."""
    yield step["name"]
    yield from (f"{key} {value}" for key, value in step.items() if key != "name")


@dataclass(frozen=True)
class FileFacts:
    """What was written into a file: its size in bytes and its SHA-256, 64 hex digits. accepted: a user changed the file
    on purpose, and said so."""

    size: int
    sha256: str
    accepted: bool = False


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished folder. files: what was written, by name; versions: of the packages that took part."""

    format: int
    step: str
    inputs: Mapping[str, Any]
    files: Mapping[str, FileFacts]
    versions: Mapping[str, str]
    contract: Promise | None = None
    geometry: ModelFacts | None = None
    results: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        return as_json(self)

    @property
    def contents(self) -> dict[str, str]:
        """SHA-256 of every file as it was written, by name."""
        return {name: facts.sha256 for name, facts in self.files.items()}

    @property
    def nbytes(self) -> int:
        """The size of all files in bytes."""
        return sum(facts.size for facts in self.files.values())

    @property
    def origin(self) -> Origin:
        """The origin of the export, or of the export behind an engine. Raises UserError for other folders."""
        where = f"manifest of {self.step!r}: inputs"
        found = read(Origin, self.inputs.get("export", self.inputs), where)
        if not found.schemes or not all(isinstance(step.get("name"), str) for step in found.steps):
            raise UserError(f"{where}: no scheme, or a step without a name", expected="one graph or more", do=DO)
        return found

    def inputs_as(self, record: type[T]) -> T:
        """The inputs, as the record that the step writes. Raises UserError for those of another step."""
        return read(record, self.inputs, f"manifest of {self.step!r}: inputs")

    def results_as(self, record: type[T]) -> T:
        """The results, as the record that the step writes. Raises UserError for those of another step."""
        return read(record, self.results, f"manifest of {self.step!r}: results")

    @property
    def facts(self) -> ModelFacts:
        """The geometry of an export or engine. Raises UserError for other folders."""
        if self.geometry is None:
            raise UserError(f"made by {self.step!r}: its manifest has no geometry", expected="an export or an engine")
        return self.geometry
