"""Find out whether a runtime's integer products are exact on this processor, by one whose sums are the largest.

    y = x w    x: int8 (tokens, in), w: int8 (in, out), all of them 127 or -127

AVX2 multiplies pairs of u8 and s8 and adds both products in 16 bits, where 255 * 127 * 2 = 64770 becomes 32767. VNNI
and AMX add in 32 bits. For AVX2, ONNX Runtime has a setting, which the sessions here have (`onnxruntime.session`), and
OpenVINO 2026.4 has none. Weights of 7 bits would not saturate, but they have half the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy

from smoothquant.artifacts.ports import MODEL
from smoothquant.errors import UserError
from smoothquant.files import scratch, write_bytes
from smoothquant.packages import require

X, Y = "x", "y"  # names of the graph's input and output
IN, OUT, LARGEST = 256, 64, 127


def check_exact(runtime: str, run: Callable[[Path, numpy.ndarray], numpy.ndarray], do: str) -> None:
    """Raise UserError if integer products of a runtime saturate on this processor.

    run: runs the graph `model.onnx` of a folder on x, float32 (tokens, in), and gives y, float32 (tokens, out). do:
    what a user can do.
    """
    x, weight = _largest()
    with scratch() as folder:
        write_bytes(folder / MODEL, _graph(weight))
        found = run(folder, x)
    if not (found == x @ weight.astype(numpy.float32)).all():
        raise UserError(
            f"{runtime}: its INT8 products saturate at 16 bits on this processor",
            expected="exact ones, as with VNNI or AMX",
            do=do,
        )


def _largest() -> tuple[numpy.ndarray, numpy.ndarray]:
    """x and w: of one sign, of the other, and of both in turn."""
    weight = numpy.full((IN, OUT), LARGEST, numpy.int8)
    weight[:, OUT // 2 :] = -LARGEST
    x = numpy.full((3, IN), LARGEST, numpy.float32)
    x[1] = -LARGEST
    x[2, ::2] = -LARGEST
    return x, weight


def _graph(weight: numpy.ndarray) -> bytes:
    """The product in the form of every quantized linear: Q and DQ on the input, DQ on the weight."""
    onnx = require("onnx")
    helper, values = onnx.helper, onnx.numpy_helper.from_array
    nodes = [
        helper.make_node("QuantizeLinear", [X, "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["input"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale"], ["columns"], axis=1),
        helper.make_node("MatMul", ["input", "columns"], [Y]),
    ]
    constants = {
        "scale": numpy.array(1, numpy.float32),
        "zero": numpy.array(0, numpy.int8),
        "weight": weight,
        "weight_scale": numpy.ones(OUT, numpy.float32),
    }
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (None, size)) for name, size in ((X, IN), (Y, OUT))
    ]
    tensors = [values(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "saturation", ports[:1], ports[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()
