"""What a TensorRT engine's manifest says beyond an export's: its inputs and its results."""

from __future__ import annotations

from dataclasses import dataclass

from builders.nvidia.profiles import Shape
from builders.tensorrt.compiler import Options
from builders.tensorrt.kernels import BuiltProduct
from builders.tensorrt.limits import Limits
from smoothquant.artifacts.manifest import Origin

STEP = "build tensorrt"


@dataclass(frozen=True)
class BuiltOn:
    """What built a plan. version: TensorRT's; gpu: its name; capability: its compute capability."""

    version: str
    gpu: str
    capability: tuple[int, ...]


@dataclass(frozen=True)
class TensorRTInputs:
    """What an engine was built from. graph: digest of the ONNX graph."""

    export: Origin
    graph: str
    limits: Limits
    options: Options
    tensorrt: BuiltOn


@dataclass(frozen=True)
class StoredPort:
    """An input or output of the plan. dtype: PyTorch's name; shape: -1 where it varies."""

    name: str
    dtype: str
    shape: Shape
    input: bool


@dataclass(frozen=True)
class Int8Kernels:
    """What became of the quantized products. int8: how many are INT8 kernels; quantized: how many there are."""

    int8: int
    quantized: int
    products: tuple[BuiltProduct, ...]

    @property
    def lost(self) -> tuple[BuiltProduct, ...]:
        """The quantized products that are no INT8 kernels."""
        return tuple(product for product in self.products if not product.int8)


@dataclass(frozen=True)
class TensorRTResults:
    """What a build found. warnings: TensorRT's, and why there is no timing cache."""

    ports: tuple[StoredPort, ...]
    kernels: Int8Kernels
    warnings: tuple[str, ...]
