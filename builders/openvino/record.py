"""What an OpenVINO engine's manifest says beyond an export's: its inputs and its results."""

from __future__ import annotations

from dataclasses import dataclass

from builders.engine.kernels import IntegerKernels
from smoothquant.artifacts.manifest import Origin

STEP = "build openvino"


@dataclass(frozen=True)
class OpenVinoInputs:
    """What an engine was built from, and with what.

    content: digest of the graph and the files beside it. openvino: the version whose kernels were counted.
    instructions: the processor's integer instructions that the kernels use, by Linux's name; "" where none is known.
    """

    export: Origin
    content: str
    threads: int
    openvino: str
    instructions: str


@dataclass(frozen=True)
class OpenVinoResults:
    """What a build found."""

    kernels: IntegerKernels
