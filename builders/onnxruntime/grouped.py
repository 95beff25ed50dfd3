"""The attention of an exported graph as ONNX Runtime's own operator, GroupQueryAttention.

    queries, new keys and values, past ── products, mask, softmax ── present, output        as exported
    queries, new keys and values, past ── GroupQueryAttention ─────── present, output        grouped

It writes new keys and values into the buffer of the past, where both are one, and reads an INT8 cache as it is. Every
sequence of a batch is computed for itself, as far as it reaches: what it gets does not depend on its neighbours. So
sequences of different lengths share a batch; attention_mask says how long each one is, and padding can only lie on the
right. Windows, caps and ALiBi stay, as attributes and as a bias.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from builders.onnx_graph import OnnxGraph
from smoothquant.artifacts.ports import ATTENTION_MASK, CACHED, PAST, PRESENT, present
from smoothquant.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

DOMAIN, OPERATOR = "com.microsoft", "GroupQueryAttention"
SCOPE = "grouped"
MULTIPLE = 8  # of which a head's channels are one
TURN = [0, 2, 1, 3]  # (batch, heads, sequence, channels) <-> (batch, sequence, heads, channels)


@dataclass(frozen=True)
class Cached:
    """Keys or values of a layer. past, new, present: names of values; new: (batch, kv_heads, sequence, channels), not
    quantized. scale: of an INT8 cache."""

    past: str
    new: str
    present: str
    scale: str | None


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer. query: (batch, heads, sequence, channels). output: (batch, sequence, heads *
    channels). cap, window: 0 and -1 for none. bias: added to the scores, (batch, heads, sequence, total); "" for none.
    nodes: all that compute it."""

    query: str
    keys: Cached
    values: Cached
    output: str
    heads: int
    kv_heads: int
    channels: int
    scale: float
    cap: float
    window: int
    bias: str
    nodes: tuple[NodeProto, ...]


def grouped_graph(path: str | Path) -> ModelProto:
    """The graph of a file with the attention of every layer as GroupQueryAttention. Its weights stay where they are.

    Raises UserError if an attention is not what `export onnx` writes in its basic opset.
    """
    graph = OnnxGraph(path)
    count = sum(value.name.startswith(PAST) for value in graph.inputs) // len(CACHED)
    layers = [_attention(graph, layer) for layer in range(count)]
    rewriting = Rewriting(graph)
    after = {layer.output: rewriting.nodes_of(number, layer) for number, layer in enumerate(layers)}
    gone = {node.name for layer in layers for node in layer.nodes}
    nodes = [
        new
        for node in graph.proto.graph.node
        for new in (after.get(node.output[0], []) if node.name in gone else [node])
    ]
    return rewriting.finished(nodes)


class Rewriting:
    """A graph that is being rewritten. graph: the one that was read; its proto is changed."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph, self.onnx = graph, graph.onnx
        self._constants: set[str] = set()
        of_ones = self.onnx.helper.make_tensor("ones", self.onnx.TensorProto.INT64, [1], [1])
        axis, one = self._constant("axis", numpy.array([1])), self._constant("one", numpy.array(1))
        self._lengths = [
            self._node("ReduceSum", [ATTENTION_MASK, axis], ["tokens"], keepdims=0),
            self._node("Sub", [f"{SCOPE}/tokens", one], ["last"]),
            self._node("Cast", [f"{SCOPE}/last"], ["last_token"], to=self.onnx.TensorProto.INT32),
            self._node("Shape", [ATTENTION_MASK], ["shape"]),
            self._node("Gather", [f"{SCOPE}/shape", one], ["width"]),
            self._node("Cast", [f"{SCOPE}/width"], ["longest"], to=self.onnx.TensorProto.INT32),
            self._node("ConstantOfShape", [f"{SCOPE}/shape"], ["ones"], value=of_ones),
        ]
        for node in graph.readers[ATTENTION_MASK]:
            if node.op_type == "CumSum":  # ALiBi's places of keys, which lie in the buffer without gaps
                node.input[0] = f"{SCOPE}/ones"

    def nodes_of(self, number: int, layer: LayerAttention) -> list[NodeProto]:
        """The nodes that compute the attention of a layer."""
        nodes, inputs = [], []
        for name, value, heads in (
            ("query", layer.query, layer.heads),
            ("key", layer.keys.new, layer.kv_heads),
            ("value", layer.values.new, layer.kv_heads),
        ):
            place = f"{number}/{name}"
            shape = self._constant(f"shape.{heads}", numpy.array([0, 0, heads * layer.channels]))
            nodes.append(self._node("Transpose", [value], [f"{place}.turned"], perm=TURN))
            nodes.append(self._node("Reshape", [f"{SCOPE}/{place}.turned", shape], [place]))
            inputs.append(f"{SCOPE}/{place}")
        inputs += [layer.keys.past, layer.values.past, f"{SCOPE}/last_token", f"{SCOPE}/longest", "", "", ""]
        inputs += [layer.bias, ""]
        attributes: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale}
        attributes |= {"softcap": layer.cap} if layer.cap else {}
        attributes |= {"local_window_size": layer.window} if layer.window > 0 else {}
        if layer.keys.scale and layer.values.scale:
            one = self._constant("scale_shape", numpy.array([1]))
            for part, name in (("key", layer.keys.scale), ("value", layer.values.scale)):
                nodes.append(self._node("Reshape", [name, one], [f"{number}/{part}.scale"]))
                inputs.append(f"{SCOPE}/{number}/{part}.scale")
            attributes |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        while not inputs[-1]:
            inputs.pop()
        outputs = [layer.output, layer.keys.present, layer.values.present]
        make = self.onnx.helper.make_node
        return [*nodes, make(OPERATOR, inputs, outputs, name=f"{SCOPE}/{number}", domain=DOMAIN, **attributes)]

    def finished(self, nodes: list[NodeProto]) -> ModelProto:
        """The model with these nodes, without those that nothing reads, and without constants that nothing reads."""
        proto = self.graph.proto
        used = {value.name for value in proto.graph.output}
        kept = []
        for node in reversed([*self._lengths, *nodes]):
            if used.intersection(node.output):
                kept.append(node)
                used.update(node.input)
        constants = [tensor for tensor in proto.graph.initializer if tensor.name in used]
        del proto.graph.node[:], proto.graph.initializer[:]
        proto.graph.node.extend(reversed(kept))
        proto.graph.initializer.extend(constants)
        proto.opset_import.append(self.onnx.helper.make_opsetid(DOMAIN, 1))
        for value in (*proto.graph.input, *proto.graph.output):  # buffers are as long as their owner makes them
            if value.name.startswith((PAST, PRESENT)):
                size = value.type.tensor_type.shape.dim[2]
                size.dim_param = "past_buffer" if value.name.startswith(PAST) else "buffer"
        return proto

    def _node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
        names = [f"{SCOPE}/{name}" for name in outputs]
        return self.onnx.helper.make_node(kind, inputs, names, name=f"{names[0]}/{kind}", **attributes)

    def _constant(self, name: str, value: numpy.ndarray) -> str:
        name = f"{SCOPE}/{name}"
        if name not in self._constants:
            self._constants.add(name)
            self.graph.proto.graph.initializer.append(self.onnx.numpy_helper.from_array(value, name))
        return name


def _attention(graph: OnnxGraph, number: int) -> LayerAttention:
    """The attention of a layer, as `exporters.onnx.decoder` writes it for opsets without one."""
    walk = Walk(graph, number)
    keys, values = (walk.cached(part) for part in CACHED)
    product = walk.through(keys.present, "MatMul", "Transpose", "DequantizeLinear", "Cast")
    scaled = walk.back(product.input[0], "Mul")
    rows = walk.back(scaled.input[0], "Reshape")
    masked, cap = walk.reader(product, "Div", "Add"), 0.0
    if masked.op_type == "Div":  # cap * tanh(scores / cap)
        cap = walk.one(masked.input[1])
        masked = walk.reader(walk.reader(walk.reader(masked, "Tanh"), "Mul"), "Add")
    softmax = walk.reader(masked, "Softmax")
    mixed = walk.through(values.present, "MatMul", "DequantizeLinear", "Cast")
    if mixed.input[0] != softmax.output[0]:
        raise walk.unlike()
    heads = walk.reader(mixed, "Reshape")
    flat = walk.reader(walk.reader(heads, "Transpose"), "Reshape")
    _, kv_heads, _, channels = walk.numbers(rows.input[1])
    window, bias = walk.mask(masked.input[1])
    if channels % MULTIPLE:
        raise UserError(
            f"{graph.path}: heads of {channels} channels",
            expected=f"a multiple of {MULTIPLE}, for ONNX Runtime's {OPERATOR}",
            do="build it with --attention standard",
        )
    return LayerAttention(
        query=rows.input[0],
        keys=keys,
        values=values,
        output=flat.output[0],
        heads=int(walk.numbers(heads.input[1])[1]),
        kv_heads=int(kv_heads),
        channels=int(channels),
        scale=walk.one(scaled.input[1]),
        cap=cap,
        window=window,
        bias=bias,
        nodes=tuple(walk.seen.values()),
    )


class Walk:
    """A way through the nodes of one layer's attention. seen: the nodes on it, by their names."""

    def __init__(self, graph: OnnxGraph, number: int) -> None:
        self.graph, self.number = graph, number
        self.seen: dict[str, NodeProto] = {}

    def cached(self, part: str) -> Cached:
        """part: of `CACHED`."""
        out = present(self.number, part)
        concat = self.back(out, "Concat")
        past, new = concat.input
        scale = None
        if (node := self.graph.producer.get(new)) is not None and node.op_type == "QuantizeLinear":
            quantized = self.back(new, "QuantizeLinear")
            new, scale = quantized.input[:2]
            if (node := self.graph.producer.get(new)) is not None and node.op_type == "Cast":
                new = self.back(new, "Cast").input[0]
        return Cached(past, new, out, scale)

    def back(self, value: str, kind: str) -> NodeProto:
        """The node that makes a value."""
        node = self.graph.producer.get(value)
        if node is None or node.op_type != kind:
            raise self.unlike()
        self.seen[node.name] = node
        return node

    def reader(self, node: NodeProto, *kinds: str) -> NodeProto:
        """The only node that reads a node's output."""
        found = self.graph.readers[node.output[0]]
        if len(found) != 1 or found[0].op_type not in kinds:
            raise self.unlike()
        self.seen[found[0].name] = found[0]
        return found[0]

    def through(self, value: str, kind: str, *between: str) -> NodeProto:
        """The node of a kind that reads a value, behind nodes of other kinds."""
        node = self.reader(self.graph.producer[value], kind, *between)
        while node.op_type != kind:
            node = self.reader(node, kind, *between)
        return node

    def mask(self, value: str) -> tuple[int, str]:
        """The window that a mask has, -1 for none, and the bias that it holds, "" for none."""
        node = self.graph.producer.get(value)
        while node is not None and node.op_type in ("Concat", "Reshape"):
            node = self.graph.producer.get(node.input[0])
        if node is None or node.op_type != "Where":
            raise self.unlike()
        bias = "" if self.graph.is_constant(node.input[1]) else node.input[1]
        waiting, window = [node.input[0]], -1
        while waiting:
            made = self.graph.producer.get(waiting.pop())
            if made is None or made.op_type not in ("And", "Greater", "Unsqueeze", "LessOrEqual"):
                continue
            if made.op_type == "Greater":
                oldest = self.graph.producer[made.input[1]]
                window = int(self.one(oldest.input[1]))
            waiting += made.input
        return window, bias

    def numbers(self, value: str) -> numpy.ndarray:
        """The content of a constant."""
        found = self.graph.array(value)
        if found is None:
            raise self.unlike()
        return found

    def one(self, value: str) -> float:
        """The only number of a constant."""
        return float(self.numbers(value))

    def unlike(self) -> UserError:
        """The error about an attention that is not as it should be."""
        return UserError(
            f"{self.graph.path}: the attention of layer {self.number} is not what smoothquant export onnx writes",
            expected="a graph of the default opset",
            do="export it again without --opset, or build it with --attention standard",
        )
