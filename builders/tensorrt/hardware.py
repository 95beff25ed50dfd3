"""Find TensorRT's Python package and a GPU that PyTorch sees, and check that a plan fits them.

A plan holds kernels of one compute capability, in the format of one TensorRT release. Two options loosen that: a
version-compatible plan also runs in later releases of the same major version, and a hardware-compatible plan on every
GPU from Ampere (8.0) on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from builders.onnx_graph import OnnxGraph
from builders.tensorrt.record import TensorRTInputs
from smoothquant.errors import MissingPackageError, UserError
from smoothquant.packages import require

OLDEST, BEYOND = (10, 1), (12,)  # versions of TensorRT with our API; 10.0 lacks weight_streaming_budget_v2
CUMULATIVE = (10, 8)  # the first whose parser has a layer for CumSum (onnx/onnx-tensorrt#1012)
INSTALL = "pip install tensorrt, or use the image of docker/tensorrt"
AMPERE = (8, 0)


def require_tensorrt() -> str:
    """The version of the package tensorrt. Raises MissingPackageError if it is absent, too old or too new."""
    try:
        found = str(require("tensorrt").__version__)
    except (MissingPackageError, OSError) as error:
        cause = error.__cause__ or error
        absent = isinstance(cause, ModuleNotFoundError) and cause.name == "tensorrt"
        reason = "is not installed" if absent else f"cannot be loaded ({cause})"
        raise MissingPackageError(f"the package tensorrt {reason}", do=INSTALL) from error
    if not OLDEST <= _numbers(found) < BEYOND:
        raise MissingPackageError(f"TensorRT {found} is installed", expected="version 10.1 or later, or 11", do=INSTALL)
    return found


def check_sums(graph: OnnxGraph, version: str) -> None:
    """Raise MissingPackageError if a graph has a CumSum (ALiBi, experts) and this TensorRT is too old for it.

    Before 10.8 the parser makes a loop of it, a turn for every token, and documents no int64 (docs/operators.md).
    """
    if _numbers(version) < CUMULATIVE and any(True for _ in graph.standard("CumSum")):
        raise MissingPackageError(
            f"{graph.path}: TensorRT {version} runs CumSum as a loop, one turn for every token",
            expected="version 10.8 or later, for ALiBi and for experts",
            do="use the image of docker/tensorrt",
        )


class Gpu:
    """The GPU that this process uses, and a CUDA stream on it.

    name: the name that the driver gives. capability: the compute capability. device: PyTorch's device.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.capability: tuple[int, int] = torch.cuda.get_device_capability(self.device)
        self._stream = torch.cuda.Stream(self.device)

    @property
    def stream(self) -> int:
        """The stream's CUDA handle."""
        return self._stream.cuda_stream

    def use(self) -> AbstractContextManager:
        """A context in which PyTorch's work goes to the stream, too."""
        return torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Wait until all work on the stream is done."""
        self._stream.synchronize()

    def select(self) -> None:
        """Make this the GPU of the calling thread."""
        torch.cuda.set_device(self.device)


def find_gpu() -> Gpu:
    """The GPU of this machine. Raises MissingPackageError if PyTorch sees none."""
    if not torch.cuda.is_available():
        lacks = "this PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA GPU or driver"
        raise MissingPackageError(
            f"no GPU: {lacks}",
            expected="an NVIDIA GPU and a PyTorch for CUDA",
            do="run it on the machine that will serve the engine (docker run --gpus all)",
        )
    return Gpu()


def check_plan_fits(folder: Path, made: TensorRTInputs, gpu: Gpu, version: str) -> None:
    """Raise UserError if a plan was built for another GPU or TensorRT than these. made: of the engine's manifest."""
    built, options = made.tensorrt, made.options
    there, here = built.capability, gpu.capability
    portable = options.hardware_compatible and here >= AMPERE
    if here != there and not portable:
        raise UserError(
            f"{folder}: built for compute capability {_dotted(there)} ({built.gpu}), this GPU has {_dotted(here)}",
            expected=f"a GPU like the {built.gpu}",
            do="build it again on this GPU, or with --hardware-compatibility ampere+ for all from Ampere on",
        )
    then, now = _numbers(built.version), _numbers(version)
    portable = options.version_compatible and then[0] == now[0] and then <= now
    if then != now and not portable:
        raise UserError(
            f"{folder}: built by TensorRT {built.version}, this is {version}",
            expected=f"TensorRT {built.version}",
            do="build it again with this version, or with --version-compatible for later ones of the same generation",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())[:4]


def _dotted(capability: tuple) -> str:
    return ".".join(map(str, capability))
