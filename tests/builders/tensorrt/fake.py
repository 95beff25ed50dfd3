"""A stand-in for the `tensorrt` module and its GPU: same calls, same refusals, and ONNX Runtime does the arithmetic.

A plan is a note of which graph it was built from and with which profiles. A context reads its inputs at the addresses
it was given, and writes its outputs there, as TensorRT does; it refuses what TensorRT refuses: a shape outside of the
profile, an input without a shape or an address, an output that lies on an input. (A cache that is written in place must
lie on its past.) Everything it is told is in `calls`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import onnx
import torch

from builders.onnxruntime.session import open_session
from smoothquant.machine import subnormals_as_zero

MAGIC = b"fake plan "
NUMPY = {1: numpy.float32, 7: numpy.int64, 10: numpy.float16, 3: numpy.int8}  # by ONNX's codes
NAMES = {1: "FLOAT", 7: "INT64", 10: "HALF", 3: "INT8", 16: "BF16"}


class FakeGpu:
    """Where a real one has a CUDA stream, this one has the CPU, which is done at once."""

    def __init__(self, name: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0)) -> None:
        self.name, self.capability, self.device, self.stream = name, capability, torch.device("cpu"), 7
        self.selected = self.waited = 0

    def use(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def wait(self) -> None:
        self.waited += 1

    def select(self) -> None:
        self.selected += 1


class _Named:
    """A value of an enumeration."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return self.name


def _enumeration(name: str, *values: str) -> type:
    return type(name, (), {value: _Named(value, index) for index, value in enumerate(values)})


class Faults:
    """What is to go wrong. refuse_operator: the parser does not know it; no_plan: the builder's last words;
    no_context: there is no memory for one; float_nodes: products that do not become INT8 kernels."""

    def __init__(self) -> None:
        self.refuse_operator = self.no_plan = ""
        self.no_context = False
        self.float_nodes: set[str] = set()


def module(version: str = "11.1.0.106") -> Any:
    """A fresh module, with `calls`: a list of tuples, and `faults`."""
    trt: Any = ModuleType("tensorrt")
    trt.__version__, trt.calls, trt.faults = version, [], Faults()
    trt.DataType = _enumeration("DataType", "FLOAT", "HALF", "INT8", "INT64", "BF16", "INT32")
    aliases = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int32": "INT32", "int64": "INT64"}
    for alias, name in aliases.items():  # Polygraphy looks at them
        setattr(trt, alias, getattr(trt.DataType, name))
    trt.TensorIOMode = _enumeration("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    trt.ProfilingVerbosity = _enumeration("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
    trt.MemoryPoolType = _enumeration("MemoryPoolType", "WORKSPACE")
    trt.HardwareCompatibilityLevel = _enumeration("HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS")
    trt.BuilderFlag = _enumeration("BuilderFlag", "VERSION_COMPATIBLE", "WEIGHT_STREAMING", "TF32")
    trt.LayerInformationFormat = _enumeration("LayerInformationFormat", "ONELINE", "JSON")
    trt.NetworkDefinitionCreationFlag = _enumeration("Flag", "EXPLICIT_BATCH", "STRONGLY_TYPED")
    trt.ILogger = type("ILogger", (), {**_enumeration("S", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO").__dict__})
    trt.IProgressMonitor = type("IProgressMonitor", (), {})
    trt.Builder = lambda log: Builder(trt, log)
    trt.OnnxParser = lambda network, log: Parser(trt, network, log)
    trt.Runtime = lambda log: Runtime(trt, log)
    return trt


# -- building ----------------------------------------------------------------------------------------------------------


class _Tensor:
    def __init__(self, value: Any) -> None:
        dims = value.type.tensor_type.shape.dim
        self.name, self.element = value.name, value.type.tensor_type.elem_type
        self.shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)


class _Network:
    inputs: list[_Tensor]
    path: str

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]


class _Error:
    def __init__(self, node: str, operator: str, text: str) -> None:
        self.node_name, self.node_operator, self.desc = (lambda: node), (lambda: operator), (lambda: text)


class Parser:
    def __init__(self, trt: Any, network: _Network, log: Any) -> None:
        self.trt, self.network, self.log, self.errors = trt, network, log, []

    def parse_from_file(self, path: str) -> bool:
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except Exception as error:
            self.log.log(self.trt.ILogger.ERROR, f"In parseFromFile: {error}")
            return False
        refused = [node for node in graph.node if node.op_type == self.trt.faults.refuse_operator]
        self.errors = [_Error(node.name, node.op_type, "no importer\nregistered for it") for node in refused]
        self.network.path, self.network.inputs = path, _inputs(graph)
        return not refused

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> _Error:
        return self.errors[index]


class _Shapes:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple] = {}

    def set_shape(self, name: str, least: tuple, usual: tuple, most: tuple) -> None:
        self.shapes[name] = (least, usual, most)

    @property
    def valid(self) -> bool:
        """Every range grows, and the graph is consistent at its three points."""
        grow = all(a <= b <= c for shapes in self.shapes.values() for a, b, c in zip(*shapes, strict=True))
        past = next(shapes for name, shapes in self.shapes.items() if name.startswith("past"))
        if "write_indices" in self.shapes:
            return grow
        ids, mask = self.shapes["input_ids"], self.shapes["attention_mask"]
        same = all(mask[point][1] == past[point][2] + ids[point][1] for point in range(3))
        return grow and same and self.shapes["position_ids"] == ids


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class _Config:
    def __init__(self, trt: Any) -> None:
        self.trt, self.profiles, self.flags, self.pools, self.timing = trt, [], {"TF32"}, {}, None
        self.progress_monitor: Any = None

    def set_flag(self, flag: _Named) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: _Named) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: _Named, size: int) -> None:
        self.pools[pool.name] = size

    def add_optimization_profile(self, profile: _Shapes) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1 if profile.valid else -1

    def create_timing_cache(self, content: bytes) -> _TimingCache | None:
        return None if content.startswith(b"garbage") else _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self.trt.calls.append(("timing cache", cache.content))
        if cache.content.startswith(b"other"):
            return False
        self.timing = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self.timing and _TimingCache(self.timing.content + b"+1")


class Builder:
    def __init__(self, trt: Any, log: Any) -> None:
        assert not gc.isenabled()  # the logger is called under a mutex that the end of a builder waits for
        self.trt, self.log = trt, log

    def create_network(self, flags: int) -> _Network:
        assert flags == 2  # strongly typed
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config(self.trt)

    def create_optimization_profile(self) -> _Shapes:
        return _Shapes()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        self.trt.calls.append(("config", config))
        monitor, error = config.progress_monitor, self.trt.ILogger.ERROR
        monitor.phase_start("Building", None, 2)
        for outer in range(2):
            monitor.phase_start("Timing", "Building", 4)
            for inner in range(4):
                if not monitor.step_complete("Timing", inner):
                    self.log.log(error, "Error Code 7: BuildCanceled (Build canceled by user)")
                    return None
            monitor.phase_finish("Timing")
            monitor.step_complete("Building", outer)
        monitor.phase_finish("Building")
        self.log.log(self.trt.ILogger.WARNING, "Make sure input input_ids has Int64 binding.")
        if self.trt.faults.no_plan:
            self.log.log(error, self.trt.faults.no_plan)
            return None
        shapes = [profile.shapes for profile in config.profiles]
        built = {"path": network.path, "version": self.trt.__version__, "profiles": shapes}
        return MAGIC + json.dumps(built).encode()


# -- running -----------------------------------------------------------------------------------------------------------


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, trt: Any, log: Any) -> None:
        assert not gc.isenabled()
        self.trt, self.log = trt, log

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        content = bytes(memoryview(plan))
        self.trt.calls.append(("host code", self.engine_host_code_allowed))
        if not content.startswith(MAGIC):
            self.log.log(self.trt.ILogger.ERROR, "Serialization (magic tag does not match)")
            return None
        return Engine(self.trt, json.loads(content.removeprefix(MAGIC)))


def _inputs(graph: onnx.GraphProto) -> list[_Tensor]:
    """Those of the network: an input with a default is a constant to TensorRT."""
    defaults = {tensor.name for tensor in graph.initializer}
    return [_Tensor(value) for value in graph.input if value.name not in defaults]


class Engine:
    weight_streaming_budget_v2 = 0

    def __init__(self, trt: Any, built: dict) -> None:
        self.trt, self.built = trt, built
        graph = onnx.load(built["path"], load_external_data=False).graph
        self.inputs, self.outputs = _inputs(graph), [_Tensor(value) for value in graph.output]
        self.tensors = {tensor.name: tensor for tensor in (*self.inputs, *self.outputs)}
        self.graph = graph

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> _Named:
        mode = self.trt.TensorIOMode
        return mode.INPUT if name in {tensor.name for tensor in self.inputs} else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> _Named:
        return getattr(self.trt.DataType, NAMES[self.tensors[name].element])

    def get_tensor_shape(self, name: str) -> tuple:
        return self.tensors[name].shape

    def get_weight_streaming_automatic_budget(self) -> int:
        return 123

    def create_execution_context(self) -> Context | None:
        self.trt.calls.append(("budget", self.weight_streaming_budget_v2))
        return None if self.trt.faults.no_context else Context(self)

    def create_engine_inspector(self) -> Engine:
        return self

    def get_engine_information(self, form: _Named) -> str:
        """Two kernels a product, as TensorRT 11 and 10 write them; the second profile's have a mark."""
        assert form.name == "JSON"
        old, layers = self.trt.__version__.startswith("10"), []
        for profile in range(len(self.built["profiles"])):
            for node in (node for node in self.graph.node if node.op_type == "MatMul"):
                integer = node.input[1].split("/")[-1].startswith("Dequantize") and node.name not in self.float_nodes
                dtype = "Int8" if integer else "Float"
                tensor = {"Name": node.input[0], "Format/Datatype" if old else "Datatype": dtype}
                mark = f" [profile {profile}]" if profile else ""
                metadata = f"[ONNX Layer: {node.name}]" + ("\x1e" if old else "")
                common = {"LayerType": "gemm", "TacticName": f"sm80_gemm_{dtype.lower()}", "Metadata": metadata}
                layers.append({"Name": node.name + mark, "Inputs": [tensor], **common})
                epilogue = {"Name": "x", "Format/Datatype" if old else "Datatype": "Float"}
                common = {"LayerType": "kgen", "TacticName": "__myl_Mul_0x4d3a", "Metadata": metadata}
                layers.append({"Name": f"__myl_Mul{mark}", "Inputs": [epilogue], **common})
        return json.dumps({"Layers": layers, "Bindings" if old else "I/O Tensors": list(self.tensors)})

    @property
    def float_nodes(self) -> set[str]:
        return self.trt.faults.float_nodes


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.trt, self.profile = engine, engine.trt, 0
        self.shapes: dict[str, tuple] = {}
        self.addresses: dict[str, int] = {}
        self.session = open_session(Path(engine.built["path"]).parent)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == 7
        self.trt.calls.append(("profile", index))
        self.profile, self.shapes = index, {}
        return index < len(self.engine.built["profiles"])

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        least, _, most = self.engine.built["profiles"][self.profile][name]
        fits = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, f"{name}: no address"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        inputs, outputs = self.engine.inputs, self.engine.outputs
        feed = {tensor.name: self._array(tensor, self.shapes[tensor.name]).copy() for tensor in inputs}
        places = self.shapes.get("attention_mask") or tuple(feed["write_indices"].tolist())
        self.trt.calls.append(("run", self.profile, self.shapes["input_ids"], places))
        with subnormals_as_zero():
            found = self.session.run([tensor.name for tensor in outputs], feed)
        read = {self._range(tensor, self.shapes[tensor.name]) for tensor in inputs}
        updated = {node.output[0]: node.input[0] for node in self.engine.graph.node if node.op_type == "TensorScatter"}
        for tensor, array in zip(outputs, found, strict=True):
            first, last = self._range(tensor, array.shape)
            if tensor.name in updated:
                assert first == self.addresses[updated[tensor.name]], f"{tensor.name} does not lie on its past"
                self._array(tensor, array.shape)[...] = array
                continue
            assert all(last <= start or end <= first for start, end in read), f"{tensor.name} lies on an input"
            self._array(tensor, array.shape)[...] = array
        return True

    def _range(self, tensor: _Tensor, shape: tuple) -> tuple[int, int]:
        address = self.addresses[tensor.name]
        return address, address + int(numpy.prod(shape)) * numpy.dtype(NUMPY[tensor.element]).itemsize

    def _array(self, tensor: _Tensor, shape: tuple) -> numpy.ndarray:
        first, last = self._range(tensor, shape)
        memory = (ctypes.c_byte * (last - first)).from_address(first)
        return numpy.frombuffer(memory, NUMPY[tensor.element]).reshape(shape)
