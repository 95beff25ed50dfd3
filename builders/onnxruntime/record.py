"""What an ONNX Runtime engine's manifest says beyond an export's: its inputs and its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builders.engine.kernels import IntegerKernels
from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.artifacts.record import as_json

STEP = "build onnxruntime"
CPU = "cpu"
STANDARD, GROUPED = ATTENTION = ("standard", "grouped")  # operators of ONNX, or ONNX Runtime's own


@dataclass(frozen=True)
class OnnxRuntimeInputs:
    """What an engine was built from. content: digest of the graph and the files beside it. provider: where the
    engine is to run. attention: a form of `ATTENTION`."""

    export: Origin
    content: str
    threads: int
    provider: str = CPU
    attention: str = STANDARD

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values. The CPU's provider and standard operators go without saying."""
        plain = {"provider": CPU, "attention": STANDARD}
        return {key: value for key, value in as_json(self).items() if plain.get(key) != value}


@dataclass(frozen=True)
class OnnxRuntimeResults:
    """What a build found."""

    kernels: IntegerKernels


def provider_of(manifest: Manifest) -> str:
    """The provider that a folder is for: an engine's own, the CPU's for an export."""
    return manifest.inputs_as(OnnxRuntimeInputs).provider if manifest.step == STEP else CPU


def attention_of(manifest: Manifest) -> str:
    """The form of a folder's attention, of `ATTENTION`."""
    return manifest.inputs_as(OnnxRuntimeInputs).attention if manifest.step == STEP else STANDARD
