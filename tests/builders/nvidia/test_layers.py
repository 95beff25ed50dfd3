"""The table of layers: rows as TensorRT-RTX 1.7 logs them, and as the inspector has them in JSON."""

from __future__ import annotations

import json

import pytest

from builders.check.tensorrt_rtx.compiler import Compilation
from builders.nvidia.layers import EngineLayer, read_layers, read_logged_layers
from smoothquant.errors import UserError

TENSOR = "{{ Name: {0}, Dimensions: [-1,256], Strides: [256,1], StrideOrder: [1,0], Datatype: {1}, Format: (Linear) }}"
STUB = "__myelin_CASK_STUB"
ROW = (
    "Name: {name}, LayerType: {kind}, Inputs: [{inputs}], Constants: [{constants}], Outputs: [{outputs}], "
    "TacticName: {stub}, StreamId: 0, Metadata: {nodes}"
)


def row(name: str, kind: str, inputs: str, constants: str = "", nodes: str = "") -> str:
    def tensors(dtypes: str) -> str:
        return ", ".join(TENSOR.format(f"t{n}", dtype) for n, dtype in enumerate(dtypes.split()))

    made = {"inputs": tensors(inputs), "constants": tensors(constants), "outputs": tensors("Float"), "stub": STUB}
    return ROW.format(name=name, kind=kind, nodes="".join(f"[ONNX Layer: {n}]" for n in nodes.split()), **made)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, "{}", '{"Layers": 7}', '{"Layers": [{"Inputs": [1]}]}']
)
def test_what_is_no_table(text: str) -> None:
    with pytest.raises(UserError, match="TensorRT's table of layers is none"):
        read_layers(text)


def test_layers_are_read_from_the_log() -> None:
    table = "\n".join(
        [
            "Layers:",
            row("qkv/MatMul_myl1_2", "gemm", "Int8", "Int8 Float", "qkv/MatMul qkv/DequantizeLinear qkv/MatMul"),
            row("head/MatMul_myl1_9", "gemm", "Half", "Int8", "head/MatMul"),
            row("__myl_Mul_myl1_1", "kgen", "Float Int64", nodes="norm/Mul"),
            "",
            "I/O Tensors:",
            " Name: input_ids, IOMode: Input, DataType: Int64",
        ]
    )
    layers = read_logged_layers(["Parsing node: qkv/MatMul", table, "Total Activation Memory: 7 bytes"])
    assert layers == (  # the second has an int8 weight alone
        EngineLayer("qkv/MatMul_myl1_2", "gemm", ("Int8",), ("Float",), ("qkv/MatMul", "qkv/DequantizeLinear"), STUB),
        EngineLayer("head/MatMul_myl1_9", "gemm", ("Half",), ("Float",), ("head/MatMul",), STUB),
        EngineLayer("__myl_Mul_myl1_1", "kgen", ("Float", "Int64"), ("Float",), ("norm/Mul",), STUB),
    )
    assert [layer.what for layer in layers] == ["Int8 gemm", "Half gemm", "kgen"]
    made = Compilation(layers)
    assert made.int8_nodes() == {"qkv/MatMul", "qkv/DequantizeLinear"}
    assert made.computing("norm/Mul") == layers[2:]
    assert made.computing("elsewhere") == ()


@pytest.mark.parametrize(("key", "between"), [("Datatype", ""), ("Format/Datatype", "\x1e")])
def test_layers_are_read_from_json(key: str, between: str) -> None:
    """As TensorRT 11 writes them, and 10."""
    written = {
        "Name": "down_proj_myl1_3 [profile 1]",
        "LayerType": "gemm",
        "Inputs": [{"Name": "x", key: "Int8"}, {"Name": "y"}],
        "Outputs": [{"Name": "z", key: "Half"}],
        "TacticName": STUB,
        "Metadata": between.join(f"[ONNX Layer: {node}]" for node in ("a/MatMul", "b/MatMul")),
    }
    read, unnamed = read_layers(json.dumps({"Layers": [written, "[trainStation1]"]}))
    assert read == EngineLayer(written["Name"], "gemm", ("Int8",), ("Half",), ("a/MatMul", "b/MatMul"), STUB, 1)
    assert unnamed == EngineLayer("[trainStation1]", "", (), (), ())
