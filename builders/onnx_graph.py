"""Read an ONNX file: the nodes that make and read each value, and the constant values. Weights stay on the disk."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from smoothquant.artifacts.ports import MODEL
from smoothquant.errors import UserError, raise_refusal
from smoothquant.packages import require
from smoothquant.reading import check_small
from smoothquant.settings import GRAPH_FACTS

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

LARGEST_GRAPH = 2**31  # bytes: what protocol buffers can hold
STANDARD = ("", "ai.onnx")
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


class OnnxGraph:
    """An ONNX graph, open for reading. Graphs within nodes (If, Loop) count as parts of it.

    path: the file, or a folder that holds model.onnx. Raises UserError if the file is not an ONNX model,
    MissingPackageError without the package onnx.
    """

    def __init__(self, path: str | Path) -> None:
        self.onnx = require("onnx")
        path = Path(path)
        self.path = path / MODEL if path.is_dir() else path
        self.proto = self._load()
        self.nodes: list[NodeProto] = []
        self.stored: dict[str, TensorProto] = {}
        self.producer: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        self._constants: set[str] = set()
        self._index(self.proto.graph)

    def _load(self) -> Any:
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file", expected="an ONNX file, or a folder with model.onnx")
        check_small(self.path, most=LARGEST_GRAPH)
        try:
            proto = self.onnx.load(str(self.path), load_external_data=False)
        except Exception as error:  # protobuf raises errors of several classes
            raise_refusal(error, self.path)
            raise self._no_onnx() from error
        if not proto.ir_version or not proto.graph.node:
            raise self._no_onnx()
        return proto

    def _no_onnx(self) -> UserError:
        return UserError(f"{self.path}: not an ONNX model", expected="a whole .onnx file", do="make or copy it again")

    def _index(self, graph: GraphProto) -> None:
        self.stored |= {tensor.name: tensor for tensor in graph.initializer}
        self._constants |= {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            self.nodes.append(node)
            self.producer |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers[name].append(node)
            if node.op_type == "Constant":
                value = self._constant_value(node)
                if value is not None:
                    self.stored[node.output[0]] = value
            inner = list(subgraphs(node))
            for other in inner:
                self._index(other)
            if not inner and node.op_type not in RANDOM and self._constants.issuperset(filter(None, node.input)):
                self._constants |= set(node.output)  # the nodes come in the order in which they can run

    def _constant_value(self, node: NodeProto) -> TensorProto | None:
        helper, numpy_helper = self.onnx.helper, self.onnx.numpy_helper
        for attribute in node.attribute:  # a valid graph has one
            if attribute.name == "value":
                return attribute.t
            if attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
                dtype = numpy.float32 if "float" in attribute.name else numpy.int64
                return numpy_helper.from_array(numpy.array(helper.get_attribute_value(attribute), dtype))
        return None

    # -- opsets and names ----------------------------------------------------------------------------------------

    @property
    def opset(self) -> int:
        return max((entry.version for entry in self.proto.opset_import if entry.domain in STANDARD), default=0)

    @property
    def functions(self) -> set[tuple[str, str]]:
        """Domain and name of the functions that the file itself defines."""
        return {(function.domain, function.name) for function in self.proto.functions}

    def standard(self, *kinds: str) -> Iterator[NodeProto]:
        """The nodes of these standard operators; of every standard operator if no kind is given."""
        return (n for n in self.nodes if n.domain in STANDARD and (not kinds or n.op_type in kinds))

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """The modules that our exporter quantized, as it wrote them into the file; empty for files of other tools."""
        for entry in self.proto.metadata_props:
            if entry.key == GRAPH_FACTS:
                with suppress(ValueError, AttributeError, TypeError):  # another tool wrote the entry
                    named = json.loads(entry.value).get("quantized", ())
                    return tuple(name for name in named if isinstance(name, str))
        return ()

    @property
    def inputs(self) -> list[ValueInfoProto]:
        """The inputs of the graph that every run needs. An initializer of the same name makes one optional; TensorRT
        takes that for a constant."""
        defaults = {tensor.name for tensor in self.proto.graph.initializer}
        return [value for value in self.proto.graph.input if value.name not in defaults]

    @property
    def symbols(self) -> dict[str, list[int | str]]:
        """For each of these inputs its dimensions: numbers, or the names of symbols."""
        return {
            value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in self.inputs
        }

    @property
    def nbytes(self) -> int:
        """The bytes of the graph and of the external data that it names."""
        lengths = [
            int(entry.value)
            for tensor in self.stored.values()
            for entry in tensor.external_data
            if entry.key == "length" and entry.value.isdigit()
        ]
        return self.path.stat().st_size + sum(lengths)

    # -- values --------------------------------------------------------------------------------------------------

    def is_constant(self, name: str) -> bool:
        """Whether a value depends on no input of the graph."""
        return name in self._constants

    def source(self, name: str) -> str:
        """The value behind Identity nodes."""
        while (node := self.producer.get(name)) is not None and node.op_type == "Identity":
            name = node.input[0]
        return name

    def array(self, name: str) -> numpy.ndarray | None:
        """The content of a stored tensor; None if the value is computed or its data are missing."""
        tensor = self.stored.get(self.source(name))
        if tensor is None:
            return None
        entry = {item.key: item.value for item in tensor.external_data}  # onnx refuses files with several links
        try:
            dtype, count = self.onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), int(numpy.prod(tensor.dims))
            if tensor.data_location != self.onnx.TensorProto.EXTERNAL:
                return self.onnx.numpy_helper.to_array(tensor)
            path, offset = self.path.parent / entry["location"], int(entry.get("offset", 0))
            if path.stat().st_size - offset < count * numpy.dtype(dtype).itemsize:
                return None
            return numpy.fromfile(path, dtype, count, offset=offset).reshape(tuple(tensor.dims))
        except (OSError, ValueError, KeyError):  # the rules about files report the fault
            return None

    def dtype(self, name: str) -> str:
        """The element type of a stored tensor, such as "FLOAT16"; "" for a computed value."""
        tensor = self.stored.get(self.source(name))
        return self.onnx.TensorProto.DataType.Name(tensor.data_type) if tensor is not None else ""

    def of_type(self, kind: int) -> Iterator[NodeProto]:
        """The nodes that read a stored tensor of this element type, or cast to this type."""
        held = {name for name, tensor in self.stored.items() if tensor.data_type == kind}
        return (
            n for n in self.nodes if held.intersection(n.input) or (n.op_type == "Cast" and attribute(n, "to") == kind)
        )

    def size(self, name: str) -> int | None:
        """The number of elements of a stored tensor; None for a computed value."""
        tensor = self.stored.get(self.source(name))
        return int(numpy.prod(tensor.dims)) if tensor is not None else None

    @cached_property
    def inferred(self) -> dict[str, Any]:
        """The types of all values, by name, as far as ONNX infers them."""
        try:
            proto = self.onnx.shape_inference.infer_shapes(self.proto)
        except Exception:  # the graph is faulty, and other rules report it
            proto = self.proto
        return {value.name: value.type.tensor_type for graph in graphs(proto.graph) for value in values(graph)}

    def without_data(self) -> Any:
        """A copy of the model for onnx's checker, without the faults that this checker should not report.

        External tensors are empty. All outputs have a shape, which TensorRT does not need. The copy imports every
        domain that it uses, since other rules report foreign domains.
        """
        copy = type(self.proto)()
        copy.CopyFrom(self.proto)
        for graph in graphs(copy.graph):
            for tensor in graph.initializer:
                if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
                    tensor.ClearField("external_data")
                    tensor.ClearField("data_location")
                    tensor.dims[:] = [0]
        for value in copy.graph.output:
            value.type.tensor_type.shape.SetInParent()
        for domain in {node.domain for node in self.nodes} - {entry.domain for entry in copy.opset_import}:
            if domain not in STANDARD:
                copy.opset_import.add(domain=domain, version=1)
        return copy

    def external_faults(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each file of external data that is missing or too short, and its fault."""
        needed: dict[str, int] = {}
        for tensor in self.stored.values():
            if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in tensor.external_data}
                location = entry.get("location", tensor.name)
                try:
                    end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
                except ValueError:
                    yield location, f"has an offset or length for {tensor.name} that is not a number"
                    continue
                needed[location] = max(end, needed.get(location, 0))
        for location, end in needed.items():
            path = self.path.parent / location
            if not path.is_file():
                yield location, "is missing"
            elif path.stat().st_size < end:
                yield location, f"has {path.stat().st_size} bytes of {end}"


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs within a node: branches of If, bodies of Loop and Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and all graphs within its nodes."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def values(graph: GraphProto) -> Iterator[ValueInfoProto]:
    """Yield the values that a graph declares a type for."""
    yield from (*graph.input, *graph.value_info, *graph.output)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute: a number, a list of numbers or a string. default: the value if it is absent."""
    for found in node.attribute:
        if found.name == name:
            value = {1: found.f, 2: found.i, 3: found.s, 6: list(found.floats), 7: list(found.ints)}.get(found.type)
            return value.decode() if isinstance(value, bytes) else value
    return default


def name_of(node: NodeProto) -> str:
    """The name that TensorRT's parser gives to a node."""
    return node.name or f"node_of_{node.output[0]}"


def module_of(name: str) -> str:
    """The module that a node belongs to: its name up to the operator's, as our exporter and most others write it."""
    return name.rpartition("/")[0] or name
