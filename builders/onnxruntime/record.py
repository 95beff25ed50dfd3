"""What an ONNX Runtime engine's manifest says beyond an export's: its inputs and its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builders.engine.kernels import IntegerKernels
from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.artifacts.record import as_json

STEP = "build onnxruntime"
CPU = "cpu"


@dataclass(frozen=True)
class OnnxRuntimeInputs:
    """What an engine was built from. content: digest of the graph and the files beside it. provider: where the
    engine is to run."""

    export: Origin
    content: str
    threads: int
    provider: str = CPU

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values. The CPU's provider goes without saying."""
        content = as_json(self)
        return {key: value for key, value in content.items() if (key, value) != ("provider", CPU)}


@dataclass(frozen=True)
class OnnxRuntimeResults:
    """What a build found."""

    kernels: IntegerKernels


def provider_of(manifest: Manifest) -> str:
    """The provider that a folder is for: an engine's own, the CPU's for an export."""
    return manifest.inputs_as(OnnxRuntimeInputs).provider if manifest.step == STEP else CPU
