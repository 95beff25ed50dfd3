"""Rules about operators that TensorRT lacks, that it limits, or that only newer versions have."""

from __future__ import annotations

from collections.abc import Iterator

from builders.check.lint.rule import Book, Effect, Version
from builders.onnx_graph import STANDARD, OnnxGraph, attribute, name_of, subgraphs

BOOK = Book()
NAMES = """
    AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
    ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger
    MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
    OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty
    SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat
    StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique
"""
ABSENT = frozenset(NAMES.split())  # OnnxParser.supports_operator denies these; the tests ask it again
INSTEAD = {
    "DynamicQuantizeLinear": "divide each token by its largest magnitude and quantize with the constant scale 1/127",
    "MatMulInteger": "write QuantizeLinear, DequantizeLinear and MatMul; TensorRT fuses them",
    "QLinearMatMul": "write QuantizeLinear, DequantizeLinear and MatMul; TensorRT fuses them",
    "Compress": "gather by indices whose number is known from the input's shape",
    "NonZero": "gather by indices whose number is known from the input's shape",
}
SINCE: dict[str, Version] = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "LayerNormalization": (8, 6),
}
BFLOAT16_SINCE: Version = (9, 0)
SCATTERS = ("ScatterND", "ScatterElements")
PAST, NONPAD = slice(4, 6), 6  # inputs of Attention: past_key and past_value, nonpad_kv_seqlen


@BOOK.rule(
    "contrib-operator",
    "every operator is a standard one",
    "the parser takes an operator of any other domain, com.microsoft of ONNX Runtime included, for a plugin",
    Effect.REFUSED,
)
def contrib_operator(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    """A node of another domain, unless the file defines it as a function."""
    for node in graph.nodes:
        if node.domain not in STANDARD and (node.domain, node.op_type) not in graph.functions:
            what = f"the operator {node.domain}.{node.op_type} is not standard ONNX; TensorRT takes it for a plugin"
            yield name_of(node), what, "export the graph in standard operators (smoothquant export onnx does)"


@BOOK.rule(
    "absent-operator",
    "TensorRT has every operator",
    "no version's parser imports these operators; NonZero is a plugin, which TensorRT-RTX lacks",
    Effect.REFUSED,
)
def absent_operator(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in graph.standard(*ABSENT, "NonZero"):
        do = INSTEAD.get(node.op_type, "write it in other operators")
        yield name_of(node), f"TensorRT has no {node.op_type}", do


@BOOK.rule(
    "new-operator",
    "this TensorRT already has the operator",
    "release notes: Attention came with 10.14, RMSNormalization, RotaryEmbedding and TensorScatter with 10.15",
    Effect.REFUSED,
)
def new_operator(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in graph.standard(*SINCE):
        since = SINCE[node.op_type]
        if tensorrt < since:
            have, need = (".".join(map(str, version)) for version in (tensorrt, since))
            what = f"TensorRT {have} has no {node.op_type}, which came with {need}"
            yield name_of(node), what, f"export in basic operators (opset 17), or use TensorRT {need}"


@BOOK.rule(
    "bfloat16",
    "no tensor is BFLOAT16 before TensorRT 9",
    "release notes: BF16 came with 9.0",
    Effect.REFUSED,
)
def bfloat16(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    if tensorrt < BFLOAT16_SINCE and (node := next(graph.of_type(graph.onnx.TensorProto.BFLOAT16), None)) is not None:
        version = ".".join(map(str, tensorrt))
        yield name_of(node), f"TensorRT {version} has no BFLOAT16", "export with --dtype fp16 or fp32"


@BOOK.rule(
    "scatter-reduction",
    "ScatterND and ScatterElements have no reduction",
    "every version's parser refuses a reduction of ScatterND; TensorRT-RTX refuses both",
    Effect.REFUSED,
)
def scatter_reduction(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in graph.standard(*SCATTERS):
        reduction = attribute(node, "reduction", "none")
        if reduction != "none":
            what = f"TensorRT has no {node.op_type} with reduction={reduction}"
            yield name_of(node), what, "scatter without reduction, or sum in other operators (Gather, ReduceSum)"


@BOOK.rule(
    "if-shapes",
    "both branches of If give tensors of one shape",
    "the compiler sets one shape for the result and fails on most graphs with two",
    Effect.REFUSED,
)
def if_shapes(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    """If, with branches that end in values of different, known dimensions."""
    for node in graph.standard("If"):
        shapes = [[_shape(graph, value.name) for value in branch.output] for branch in subgraphs(node)]
        if any(a and b and a != b for a, b in zip(*shapes, strict=False)):
            what = f"the branches of If give tensors of different shapes ({shapes[0]} and {shapes[1]})"
            yield name_of(node), what, "compute both and choose with Where, or give them one shape"


def _shape(graph: OnnxGraph, name: str) -> list[int | str]:
    found = graph.inferred.get(name)
    dimensions = [size.dim_param or size.dim_value for size in found.shape.dim] if found else []
    return [] if any(size in ("", 0) or str(size).startswith("unk__") for size in dimensions) else dimensions


@BOOK.rule(
    "attention-cache",
    "Attention has one output, and neither past nor present",
    "the parsers of 10.14 to 11.4 assert this, and that softcap is 0",
    Effect.REFUSED,
)
def attention_cache(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in graph.standard("Attention"):
        if any(node.input[PAST]) or sum(map(bool, node.output)) > 1:
            what = "TensorRT has no Attention with past and present, or with more than one output"
            yield name_of(node), what, "concatenate the cache outside (Concat of past and key), and use one output"
        if attribute(node, "softcap", 0.0):
            what = "TensorRT has no Attention with a softcap"
            yield name_of(node), what, "write the attention in basic operators, with Tanh"


@BOOK.rule(
    "attention-padding",
    "the mask of Attention marks the padding",
    "the parser reads nonpad_kv_seqlen and ignores it: Attention then reads the padding",
    Effect.WRONG,
)
def attention_padding(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in graph.standard("Attention"):
        if len(node.input) > NONPAD and node.input[NONPAD]:
            what = "Attention's nonpad_kv_seqlen is ignored: TensorRT attends to the padding"
            yield name_of(node), what, "give an explicit mask"


@BOOK.rule(
    "attention-dtype",
    "Attention reads FLOAT16 or BFLOAT16",
    "TensorRT has attention kernels for these dtypes alone, and its parser lets nothing decompose Attention",
    Effect.REFUSED,
)
def attention_dtype(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in graph.standard("Attention"):
        found = graph.inferred.get(node.input[0])
        if found is not None and found.elem_type == graph.onnx.TensorProto.FLOAT:
            what = "TensorRT has no kernel for Attention in FLOAT"
            yield name_of(node), what, "export with --dtype fp16, or write the attention in basic operators"


@BOOK.rule(
    "scatter-cache",
    "the cache of TensorScatter holds floats, and its capacity is a number in the graph",
    "the parser makes KVCacheUpdate of it, which takes FLOAT, FLOAT16 and BFLOAT16 alone, and no capacity that varies",
    Effect.REFUSED,
)
def scatter_cache(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in graph.standard("TensorScatter"):
        found = graph.inferred.get(node.input[0])
        if found is None:
            continue
        if found.elem_type == graph.onnx.TensorProto.INT8:
            yield name_of(node), "TensorRT writes no integers in place", "export with a float cache, or let it grow"
        axis = attribute(node, "axis", -2)
        if found.shape.dim and not found.shape.dim[axis].dim_value:
            yield name_of(node), "the capacity of the cache is no number", "give past and present a fixed capacity"
