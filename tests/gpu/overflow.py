"""One matrix product with Q/DQ, spelled with float32 scales and with float16 ones.

All inputs and weights are 127 steps: the sum of K products is 127 * 127 * K integer steps, 6.6e7 at K = 4096, which
float16 (65504 at most) cannot hold unscaled. Scaled it is 127 * 127 * K * SCALE * SCALE = 66, and can be.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx

SCALE, COLUMNS = 1e-3, 64
EXPECTED = 127 * 127 * SCALE * SCALE  # times K


def save(path: Path, inner: int, *, float16_scales: bool) -> None:
    """x (1, inner) float16 -> y (1, COLUMNS) float16."""
    helper, tensors = onnx.helper, onnx.TensorProto
    kind = numpy.float16 if float16_scales else numpy.float32
    element = tensors.FLOAT16 if float16_scales else tensors.FLOAT
    constants = {
        "scale": numpy.array(SCALE, dtype=kind),
        "zero": numpy.array(0, dtype=numpy.int8),
        "weight": numpy.full((inner, COLUMNS), 127, dtype=numpy.int8),
        "weight_scale": numpy.full(COLUMNS, SCALE, dtype=kind),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=element, name="in"),
        helper.make_node("QuantizeLinear", ["wide", "scale", "zero"], ["integers"], name="quantize"),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["left"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale"], ["right"], axis=1, name="dequantize_weight"),
        helper.make_node("MatMul", ["left", "right"], ["product"], name="linear/MatMul"),
        helper.make_node("Cast", ["product"], ["y"], to=tensors.FLOAT16, name="out"),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", tensors.FLOAT16, (1, inner))],
        [helper.make_tensor_value_info("y", tensors.FLOAT16, (1, COLUMNS))],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
