"""The attention of an exported graph as ONNX Runtime's own operator, GroupQueryAttention.

    queries, new keys and values, past ── products, mask, softmax ── present, output        as exported
    queries, new keys and values, past ── GroupQueryAttention ─────── present, output        grouped

Where nothing but rotary positions lies between the products of q, k and v and the attention, it takes the products side
by side and turns them itself, by tables of cos and sin that ONNX Runtime computes once, as it loads the graph.

It writes new keys and values into the buffer of the past, where both are one, and reads an INT8 cache as it is. Every
sequence of a batch is computed for itself, as far as it reaches: what it gets does not depend on its neighbours. So
sequences of different lengths share a batch; attention_mask says how long each one is, and padding can only lie on the
right. Windows, caps and ALiBi stay, as attributes and as a bias.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from builders.onnx_graph import OnnxGraph
from builders.onnxruntime.grouped_reading import OPERATOR, LayerAttention, PackedHeads, Rotary, read_attention
from smoothquant.artifacts.ports import ATTENTION_MASK, CACHED, PAST, POSITION_IDS, PRESENT

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

DOMAIN = "com.microsoft"
SCOPE = "grouped"
ROTARY_MULTIPLES = 16, 8  # of which a head's channels, and half of the turned ones, are
TURN = [0, 2, 1, 3]  # (batch, heads, sequence, channels) <-> (batch, sequence, heads, channels)


def grouped_graph(path: str | Path, longest: int) -> ModelProto:
    """The graph of a file with the attention of every layer as GroupQueryAttention. Its weights stay where they are.

    longest: the largest number of tokens of a sequence.

    Raises UserError if an attention is not what `export onnx` writes in its basic opset.
    """
    graph = OnnxGraph(path)
    count = sum(value.name.startswith(PAST) for value in graph.inputs) // len(CACHED)
    layers = [read_attention(graph, layer) for layer in range(count)]
    rewriting = Rewriting(graph, longest)
    after = {layer.output: rewriting.nodes_of(number, layer) for number, layer in enumerate(layers)}
    gone = {node.name for layer in layers for node in layer.nodes}
    nodes = [
        new
        for node in graph.proto.graph.node
        for new in (after.get(node.output[0], []) if node.name in gone else [node])
    ]
    return rewriting.finished(nodes)


class Rewriting:
    """A graph that is being rewritten. graph: the one that was read; its proto is changed. longest: as above."""

    def __init__(self, graph: OnnxGraph, longest: int) -> None:
        self.graph, self.onnx, self.longest = graph, graph.onnx, longest
        self._constants: set[str] = set()
        self._tables: dict[str, str] = {}  # a value that depends on position_ids -> its table
        of_ones = self.onnx.helper.make_tensor("ones", self.onnx.TensorProto.INT64, [1], [1])
        axis, one = self._constant("axis", numpy.array([1])), self._constant("one", numpy.array(1))
        self._first = [
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
        packed = layer.packed if layer.packed is None or _takes(layer.packed, layer.channels) else None
        turned = packed.rotary if packed else None
        nodes, inputs = ([], [packed.value, "", ""]) if packed else self._heads(number, layer)
        inputs += [layer.keys.past, layer.values.past, f"{SCOPE}/last_token", f"{SCOPE}/longest"]
        inputs += [self._table(turned, value) for value in (turned.cos, turned.sin)] if turned else ["", ""]
        inputs += ["", layer.bias, ""]
        attributes: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale}
        attributes |= {"do_rotary": 1} if turned else {}
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

    def _heads(self, number: int, layer: LayerAttention) -> tuple[list[NodeProto], list[str]]:
        """The nodes that make queries, new keys and new values, (batch, sequence, heads * channels), and their
        names."""
        nodes, names = [], []
        for name, value, heads in (
            ("query", layer.query, layer.heads),
            ("key", layer.keys.new, layer.kv_heads),
            ("value", layer.values.new, layer.kv_heads),
        ):
            place = f"{number}/{name}"
            shape = self._constant(f"shape.{heads}", numpy.array([0, 0, heads * layer.channels]))
            nodes.append(self._node("Transpose", [value], [f"{place}.turned"], perm=TURN))
            nodes.append(self._node("Reshape", [f"{SCOPE}/{place}.turned", shape], [place]))
            names.append(f"{SCOPE}/{place}")
        return nodes, names

    def _table(self, rotary: Rotary, value: str) -> str:
        """A table, (longest, half), of a value that depends on position_ids alone, (batch, sequence, half)."""
        if POSITION_IDS not in self._tables:
            begin, end, step = (self._constant(f"at.{n}", numpy.array(n)) for n in (0, self.longest, 1))
            self._first.append(self._node("Range", [begin, end, step], ["places"]))
            axis = self._constant("first_axis", numpy.array([0]))
            self._first.append(self._node("Unsqueeze", [f"{SCOPE}/places", axis], ["positions"]))
            self._tables[POSITION_IDS] = f"{SCOPE}/positions"
        whole = self._copied(value)
        table = f"{value}/table"
        if table not in self._tables:
            shape = self._constant(f"table.{rotary.half}", numpy.array([self.longest, rotary.half]))
            wide = table if rotary.dtype is None else f"{table}/wide"
            self._first.append(self._node("Reshape", [whole, shape], [wide]))
            if rotary.dtype is not None:
                self._first.append(self._node("Cast", [f"{SCOPE}/{wide}"], [table], to=rotary.dtype))
            self._tables[table] = f"{SCOPE}/{table}"
        return self._tables[table]

    def _copied(self, value: str) -> str:
        """The same value of all positions, computed by copies of its nodes."""
        if value not in self._tables:
            node = self.graph.producer.get(value)
            if node is None:
                return value
            inputs = [self._copied(name) for name in node.input]
            copy = self.onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{SCOPE}/{node.name}"
            del copy.input[:], copy.output[:]
            copy.input.extend(inputs)
            copy.output.append(f"{SCOPE}/{value}")
            self._first.append(copy)
            self._tables[value] = copy.output[0]
        return self._tables[value]

    def finished(self, nodes: list[NodeProto]) -> ModelProto:
        """The model with these nodes, without those that nothing reads, and without constants that nothing reads."""
        proto = self.graph.proto
        used = {value.name for value in proto.graph.output}
        kept = []
        for node in reversed([*self._first, *nodes]):
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


def _takes(packed: PackedHeads, channels: int) -> bool:
    """Whether the operator takes queries, keys and values side by side. channels: of a head."""
    whole, half = ROTARY_MULTIPLES
    return packed.rotary is None or (channels % whole == 0 and packed.rotary.half % half == 0)
