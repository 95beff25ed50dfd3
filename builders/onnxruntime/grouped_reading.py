"""The attention of each layer, read from a graph that `export onnx` has written: what its nodes are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from builders.onnx_graph import OnnxGraph
from smoothquant.artifacts.ports import CACHED, present
from smoothquant.errors import UserError

if TYPE_CHECKING:
    from onnx import NodeProto

OPERATOR = "GroupQueryAttention"
MASKING = ("Add", "Where")  # of a mask to scores, and of scores or what stands for hidden ones
MULTIPLE = 8  # of which a head's channels are one


@dataclass(frozen=True)
class Cached:
    """Keys or values of a layer. past, new, present: names of values; new: (batch, kv_heads, sequence, channels), not
    quantized. scale: of an INT8 cache."""

    past: str
    new: str
    present: str
    scale: str | None


@dataclass(frozen=True)
class Rotary:
    """Rotary positions. cos, sin: (batch, sequence, half), float32, of the graph's position_ids. half: of the rotated
    channels; the second half of them turns with the first. dtype: ONNX's number of the type to which both are rounded;
    None for none."""

    cos: str
    sin: str
    half: int
    dtype: int | None


@dataclass(frozen=True)
class PackedHeads:
    """Queries, keys and values as they lie side by side, before their heads are apart. value: (batch, sequence,
    (heads + 2 * kv_heads) * channels). rotary: what turns queries and keys; None for nothing."""

    value: str
    rotary: Rotary | None


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer. query: (batch, heads, sequence, channels). output: (batch, sequence, heads *
    channels). cap, window: 0 and -1 for none. bias: added to the scores, (batch, heads, sequence, total); "" for none.
    packed: what queries, keys and values are made of, where they need nothing else. nodes: all that compute it."""

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
    packed: PackedHeads | None
    nodes: tuple[NodeProto, ...]


def read_attention(graph: OnnxGraph, number: int) -> LayerAttention:
    """The attention of a layer, as `exporters.onnx.decoder` writes it for opsets without one.

    Raises UserError for another one.
    """
    walk = Walk(graph, number)
    keys, values = (walk.cached(part) for part in CACHED)
    product = walk.through(keys.present, "MatMul", "Transpose", "DequantizeLinear", "Cast")
    scaled = walk.back(product.input[0], "Mul")
    rows = walk.back(scaled.input[0], "Reshape")
    masked, cap = walk.reader(product, "Reshape", "Div", *MASKING), 0.0
    apart = masked.op_type == "Reshape"  # the heads that share a kv head, for the mask
    masked = walk.reader(masked, "Div", *MASKING) if apart else masked
    if masked.op_type == "Div":  # cap * tanh(scores / cap)
        cap = walk.one(masked.input[1])
        masked = walk.reader(walk.reader(walk.reader(masked, "Tanh"), "Mul"), *MASKING)
    softmax = walk.reader(masked, "Softmax")
    weights = walk.reader(softmax, "Reshape") if apart else softmax
    mixed = walk.through(values.present, "MatMul", "DequantizeLinear", "Cast")
    if mixed.input[0] != weights.output[0]:
        raise walk.unlike()
    heads = walk.reader(mixed, "Reshape")
    flat = walk.reader(walk.reader(heads, "Transpose"), "Reshape")
    _, kv_heads, _, channels = walk.numbers(rows.input[1])
    window, bias = walk.mask(masked)
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
        packed=_packed(graph, rows.input[0], keys.new, values.new),
        nodes=tuple(walk.seen.values()),
    )


def _packed(graph: OnnxGraph, query: str, key: str, value: str) -> PackedHeads | None:
    """What queries, keys and values are made of; None where a norm or the like lies between."""
    apart, rest = _made(graph, query, "Split"), _made(graph, value, "Split")
    if apart is None or rest is None or [query, key] != list(apart.output) or value != rest.output[1]:
        return None
    turned = _made(graph, rest.input[0], "Transpose")
    shaped = turned and _made(graph, turned.input[0], "Reshape")
    if not shaped:
        return None
    plain, turned_by = rest.output[0], None
    if apart.input[0] != plain:
        turned_by = _rotary(graph, apart.input[0], plain)
        if turned_by is None:
            return None
    return PackedHeads(shaped.input[0], turned_by)


def _rotary(graph: OnnxGraph, rotated: str, plain: str) -> Rotary | None:
    """What turns queries and keys, (batch, heads, sequence, channels), as `exporters.onnx.positions` writes it; None
    for anything else."""
    if (whole := _made(graph, rotated, "Concat")) is not None:  # the other channels stay
        parts = _made(graph, whole.input[1], "Split")
        if parts is None or parts.input[0] != plain:
            return None
        rotated, plain = whole.input[0], parts.output[0]
    total = _made(graph, rotated, "Add")
    products = [_made(graph, value, "Mul") for value in total.input] if total else []
    if None in products or not products or products[0].input[0] != plain:
        return None
    swapped = _made(graph, products[1].input[0], "Concat")
    halves = swapped and _made(graph, swapped.input[1], "Split")
    if not halves or halves.input[0] != plain or list(swapped.input) != [halves.output[1], halves.output[0]]:
        return None
    (cos, dtype), (sin, _) = (_half(graph, product.input[1], place) for place, product in enumerate(products))
    sizes = graph.array(halves.input[1])
    return None if not cos or not sin or sizes is None else Rotary(cos, sin, int(sizes[0]), dtype)


def _half(graph: OnnxGraph, value: str, place: int) -> tuple[str, int | None]:
    """One of the two halves, equal but for their sign, of a table of cos or sin; "" for another value. And the type to
    which it is rounded, as `Rotary` has it."""
    node, dtype = graph.producer.get(value), None
    while node is not None and node.op_type in ("Cast", "Unsqueeze"):
        if node.op_type == "Cast":
            [dtype] = (attribute.i for attribute in node.attribute)
        node = graph.producer.get(node.input[0])
    return (node.input[place] if node is not None and node.op_type == "Concat" else ""), dtype


def _made(graph: OnnxGraph, value: str, kind: str) -> Any:
    """The node that makes a value, if it is of a kind."""
    node = graph.producer.get(value)
    return node if node is not None and node.op_type == kind else None


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
        if _made(self.graph, new, "QuantizeLinear"):
            new, scale = self.back(new, "QuantizeLinear").input[:2]
            if _made(self.graph, new, "Cast"):
                new = self.back(new, "Cast").input[0]
        return Cached(past, new, out, scale)

    def back(self, value: str, kind: str) -> NodeProto:
        """The node that makes a value."""
        node = _made(self.graph, value, kind)
        if node is None:
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

    def mask(self, masked: NodeProto) -> tuple[int, str]:
        """The window that a mask has, -1 for none, and the bias that it holds, "" for none. masked: of `MASKING`."""
        chosen = masked if masked.op_type == "Where" else _made(self.graph, masked.input[1], "Where")
        if chosen is None:
            raise self.unlike()
        bias = "" if chosen is masked or self.graph.is_constant(chosen.input[1]) else chosen.input[1]
        waiting, window = [chosen.input[0]], -1
        while waiting:
            made = self.graph.producer.get(waiting.pop())
            if made is None or made.op_type not in ("Concat", "And", "Greater", "Unsqueeze", "LessOrEqual"):
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
