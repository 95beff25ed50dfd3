"""Small graphs with one thing about them, written in ONNX's own text form, and what the real compiler makes of them.

`graph("y = MatMul(xd, wd)")`: constants that the text names are in CONSTANTS; node names are set by `[name]`, in which
two underscores stand for a slash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy
import onnx
from onnx import numpy_helper

from builders.check.lint import quantized_products
from builders.check.tensorrt_rtx import compile_onnx
from builders.nvidia.profiles import single_profile
from builders.onnx_graph import OnnxGraph

K, N = 128, 256
random = numpy.random.default_rng(0)


def _scales(count: int) -> numpy.ndarray:
    return random.uniform(0.01, 0.02, count).astype(numpy.float32)


def _with(values: numpy.ndarray, one: float) -> numpy.ndarray:
    changed = values.copy()
    changed[3] = one
    return changed


W_SCALE = _scales(N)
CONSTANTS: Mapping[str, numpy.ndarray | numpy.generic] = {
    "w": random.integers(-127, 128, (K, N), dtype=numpy.int8),
    "w_other": random.integers(-127, 128, (K, N), dtype=numpy.int8),
    "w_t": random.integers(-127, 128, (N, K), dtype=numpy.int8),
    "w_float": random.standard_normal((K, N)).astype(numpy.float32),
    "w_uint8": random.integers(0, 255, (K, N), dtype=numpy.uint8),
    "w_scale": W_SCALE,
    "w_scale_k": _scales(K),
    "w_scale_16": W_SCALE.astype(numpy.float16),
    "w_scale_zero": _with(W_SCALE, 0),
    "w_scale_negative": _with(W_SCALE, -0.01),
    "w_scale_nan": _with(W_SCALE, numpy.nan),
    "w_scale_inf": _with(W_SCALE, numpy.inf),
    "w_scale_block": random.uniform(0.01, 0.02, (K // 32, N)).astype(numpy.float32),
    "w_scale_one": numpy.float32(0.01),
    "s": numpy.float32(0.05),
    "s_16": numpy.float16(0.05),
    "s_zero": numpy.float32(0),
    "s_k": _scales(K),
    "z": numpy.int8(0),
    "z_one": numpy.int8(1),
    "z_uint8": numpy.uint8(0),
    "z_k": numpy.zeros(K, numpy.int8),
    "z_n": numpy.zeros(N, numpy.int8),
    "z_n_one": numpy.ones(N, numpy.int8),
    "z_n_uint8": numpy.full(N, 128, numpy.uint8),
    "bias": random.standard_normal(N).astype(numpy.float32),
    "smooth": random.uniform(0.5, 2, K).astype(numpy.float32),
    "smooth_column": random.uniform(0.5, 2, (K, 1)).astype(numpy.float32),
    "per_output": random.uniform(0.5, 2, N).astype(numpy.float32),
    "two": numpy.float32(2),
    "half": numpy.float16(0.088388),
    "zero_half": numpy.float16(0),
    "low_half": numpy.float16(-3e4),
    "flat": numpy.array([-1, K]),
    "rows": numpy.array([0, 8, -1, 128]),
    "heads": numpy.array([0, 32, -1, 128]),
    "shape": numpy.array([K, N]),
    "zero": numpy.array([0]),
    "one": numpy.array([1]),
    "last": numpy.array([-1]),
    "k": numpy.array([K]),
    "n": numpy.array([N]),
    "ones": numpy.array([1, 1, 1]),
    "every_k": numpy.arange(K),
    "every_n": numpy.arange(N),
}
X = "xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)"
W = "wd = DequantizeLinear <axis = 1> (w, w_scale)"
PRODUCT = "[layer__linear__MatMul] y = MatMul(xd, wd)"
LINEAR = "layer/linear"
INPUTS, OUTPUTS = f"float[batch, tokens, {K}] x", f"float[batch, tokens, {N}] y"


def graph(body: str, inputs: str = INPUTS, outputs: str = OUTPUTS, opset: int = 21) -> onnx.ModelProto:
    """A model of these nodes."""
    opsets = f'"": {opset}, "com.microsoft": 1, "local": 1'
    model = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: [{opsets}]> g ({inputs}) => ({outputs}) {{{body}}}"
    )
    for node in _nodes(model.graph):
        node.name = node.name.replace("__", "/")
    names = {name for node in _nodes(model.graph) for name in node.input} & CONSTANTS.keys()
    for name in sorted(names - {value.name for value in model.graph.input}):
        model.graph.initializer.append(numpy_helper.from_array(numpy.asarray(CONSTANTS[name]), name))
    return model


def _nodes(proto: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in proto.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


def verdict(path: Path) -> str:
    """The compiler's: "refused", "lost" if a quantized product is not INT8, else "fine"."""
    opened = OnnxGraph(path)
    made = compile_onnx(path, single_profile(2, 16, 16), opened.symbols)
    if made.errors:
        return "refused"
    products = {product.name for product in quantized_products(opened)}
    return "fine" if products and products <= made.int8_nodes() else "lost"
