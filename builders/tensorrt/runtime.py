"""Run a plan on the GPU: load it, and bind the addresses of its inputs and outputs.

One context serves both profiles and switches between them, since two contexts would hold two sets of activations. It
is told a shape or an address only where that has changed since it was last told, since a token's run is many calls and
little work. All work goes to the GPU's stream; nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from builders.nvidia import garbage
from builders.nvidia.driver import Messages, logger
from builders.nvidia.profiles import Shape
from builders.tensorrt.hardware import Gpu
from smoothquant.errors import UserError

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class Port:
    """An input or output of an engine. shape: its dimensions, with -1 for each that varies."""

    name: str
    dtype: torch.dtype
    shape: Shape
    is_input: bool


class LoadedPlan:
    """A plan, ready to run.

    Args:
        plan: the plan, a buffer.
        name: the name of the plan in errors.
        gpu: the GPU that runs it.
        trusted: whether TensorRT may run the host code that a version-compatible plan brings.
        streaming: whether weights stay in host memory when the GPU's memory is short.

    Raises UserError if TensorRT refuses the plan.
    """

    def __init__(self, plan: Any, name: str, gpu: Gpu, *, trusted: bool = False, streaming: bool = False) -> None:
        import tensorrt as trt

        self._messages = Messages()
        self.gpu, self._name, self._profile = gpu, name, 0
        with garbage.kept():
            self._runtime = trt.Runtime(logger(trt, self._messages))
            if trusted:
                self._runtime.engine_host_code_allowed = True
            self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise UserError(
                f"{name}: TensorRT {trt.__version__} refuses this plan ({self._messages.reason})",
                expected="a plan that this GPU and this TensorRT built",
                do="build it again here: smoothquant build tensorrt",
            )
        if streaming:
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self.ports = {port.name: port for port in self._ports()}
        self._context: trt.IExecutionContext | None = None
        self._shapes: dict[str, Shape] = {}  # what the context was told in this profile
        self._addresses: dict[str, int] = {}

    def layers(self) -> str:
        """The engine inspector's table of all layers, as JSON."""
        import tensorrt as trt

        inspector = self.engine.create_engine_inspector()
        return inspector.get_engine_information(trt.LayerInformationFormat.JSON)

    def run(self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Put a run on the stream. profile: its index.

        shapes: the shape of every input. addresses: where every input and output lies, in the dtype of its port.
        """
        context, told, placed = self._select(profile), self._shapes, self._addresses
        for name, shape in shapes.items():
            if told.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    raise self._failed(f"takes no {name} of shape {shape} in profile {profile}")
                told[name] = shape
        for name, address in addresses.items():
            if placed.get(name) != address:
                context.set_tensor_address(name, address)
                placed[name] = address
        if not context.execute_async_v3(self.gpu.stream):
            raise self._failed("does not run")

    def _select(self, profile: int) -> trt.IExecutionContext:
        if self._context is None:
            self._context = self.engine.create_execution_context()
            if self._context is None:
                raise self._failed("gets no room for its activations", "free GPU memory, or build with smaller limits")
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self.gpu.stream):
                raise self._failed(f"does not switch to profile {profile}")
            self._profile = profile
            self._shapes, self._addresses = {}, {}
        return self._context

    def _ports(self) -> list[Port]:
        import tensorrt as trt

        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT8: torch.int8,
            trt.DataType.INT64: torch.int64,
        }
        engine, found = self.engine, []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype = dtypes[engine.get_tensor_dtype(name)]
            found.append(Port(name, dtype, tuple(engine.get_tensor_shape(name)), is_input))
        return found

    def _failed(self, what: str, do: str = "report the engine's manifest.json") -> UserError:
        return UserError(f"{self._name}: the engine {what} ({self._messages.reason})", do=do)
