"""The manifest of an output folder: what made it, out of what, and what it found.

{"format", "step", "inputs", "files", "versions", "contract", "geometry", "results"}

inputs    of an export: an `Origin`. Of a build: a record of its own, with the origin of what it was built from as
          "export"
contract  how far smoothing changed the logits of this model; of exports and engines
geometry  numbers of the model that those who run it must know; of exports and engines
results   what else the step found: a record of its own
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, TypeVar

from smoothquant.artifacts.record import as_json, read
from smoothquant.errors import UserError
from smoothquant.scheme import Scheme
from smoothquant.settings import SmoothingSettings

T = TypeVar("T")
FIRST = ("model", "act_scales", "family", "max_positions")  # what reports say of an export before anything else


@dataclass(frozen=True)
class Promise:
    """The contract of smoothing: relative error of the logits on random tokens, and the tolerance that it is within."""

    logits_relative_error: float
    tolerance: float


@dataclass(frozen=True)
class ModelFacts:
    """Numbers of a model. cache_window: newest keys that any layer looks at, None if that is all of them."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    cache_window: int | None


@dataclass(frozen=True)
class OnnxOptions:
    """How an ONNX graph was written. body: "fp32", "fp16" or "bf16", whatever is not INT8."""

    body: str
    opset: int


@dataclass(frozen=True)
class TrtllmOptions:
    """How a TensorRT-LLM checkpoint was written. tp, pp: ranks of tensor and pipeline parallelism; trtllm_version: that
    is to build the engine."""

    quant_algo: str
    dtype: str
    tp: int
    pp: int
    trtllm_version: str


@dataclass(frozen=True)
class HuggingFaceOptions:
    """How a float checkpoint was written. dtype: of its weights, or "as stored"."""

    dtype: str


@dataclass(frozen=True)
class Origin:
    """What an export was made from. model, act_scales: fingerprints, None where there were none.

    schemes: of its graphs; one, but for an ONNX export that holds two. steps: what was done to layers between smoothing
    and storing (`smoothquant.steps`). max_positions: the length whose rotary frequencies were chosen, where a model has
    several. onnx, trtllm, hf: options of the format.
    """

    family: str
    smoothing: SmoothingSettings
    schemes: tuple[Scheme, ...]
    steps: tuple[Mapping[str, Any], ...] = ()
    model: str | None = None
    act_scales: str | None = None
    max_positions: int | None = None
    onnx: OnnxOptions | None = None
    trtllm: TrtllmOptions | None = None
    hf: HuggingFaceOptions | None = None

    @property
    def scheme(self) -> Scheme:
        """That of the only graph, or of the first."""
        return self.schemes[0]

    def words(self) -> dict[str, Any]:
        """The same for a reader of reports: what is as usual is left out."""
        told: dict[str, Any] = dict.fromkeys(FIRST)
        for name, value in vars(self).items():
            told |= self._words(name, value)
        return {key: value for key, value in told.items() if value is not None}

    def _words(self, name: str, value: Any) -> dict[str, Any]:
        """Of one field."""
        if name == "schemes":
            return self.scheme.words()
        if name == "smoothing":
            return {name: value.words()}
        if name == "steps":
            return {name: [" ".join(_step_words(step)) for step in value] or None}
        return as_json(value) if is_dataclass(value) else {name: value}

    def only(self, scheme: Scheme) -> Origin:
        """The origin of one graph of it."""
        return replace(self, schemes=(scheme,))


def _step_words(step: Mapping[str, Any]) -> Iterator[str]:
    """The name of a step, and its numbers with theirs."""
    yield step["name"]
    yield from (f"{key} {value}" for key, value in step.items() if key != "name")


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished folder. files: size by name; versions: of the packages that took part."""

    format: int
    step: str
    inputs: Mapping[str, Any]
    files: Mapping[str, int]
    versions: Mapping[str, str]
    contract: Promise | None = None
    geometry: ModelFacts | None = None
    results: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return as_json(self)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    @property
    def origin(self) -> Origin:
        """What the export was made from, or the export behind an engine. Raises UserError where there is none."""
        return read(Origin, self.inputs.get("export", self.inputs), f"manifest of {self.step!r}: inputs")

    def inputs_as(self, record: type[T]) -> T:
        """The inputs, as the record that the step writes. Raises UserError for those of another step."""
        return read(record, self.inputs, f"manifest of {self.step!r}: inputs")

    def results_as(self, record: type[T]) -> T:
        """The results, as the record that the step writes. Raises UserError for those of another step."""
        return read(record, self.results, f"manifest of {self.step!r}: results")

    @property
    def facts(self) -> ModelFacts:
        """The geometry of a folder that has one. Raises UserError for others."""
        if self.geometry is None:
            raise UserError(f"made by {self.step!r}: its manifest has no geometry", expected="an export or an engine")
        return self.geometry
