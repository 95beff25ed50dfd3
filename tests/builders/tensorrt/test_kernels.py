"""The verdict on a product, from rows as TensorRT's engine inspector writes them.

Keys, names of tactics and spellings of data types are those of dumps of TensorRT 8.6 and 10 that are public: issues
4020 and 4397 of NVIDIA/TensorRT, trt-engine-explorer's examples, the developer guide. The nodes are ours.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from builders.nvidia.layers import read_layers
from builders.tensorrt.kernels import BuiltProduct, built_products

NODE, MODULE = "model.layers.0.mlp.down_proj/MatMul", "model.layers.0.mlp.down_proj"
INT8_FUSION = "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize32x64x64_stage6_warpsize2x2x1_tensor16x8x32_by_fusion_tactic"
INT8_GEMM = "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize256x128x64_stage4_warpsize4x2x1_tensor16x8x32"
HALF_GEMM = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"
CASK = (
    "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32_"
    "tilesize256x128x64_stage4_warpsize4x2x1_g1_tensor16x8x32_t1r1s1_epifadd"
)
EPILOGUE = "__myl_AddCastMeanSubMulMeanAddSqrtDivMulCastMulAdd_0xf2543c36ff9f104bbb1655b0183afb47"
PHRASE = "Thirty-two wide channel vectorized row major Int8 format"


def row(
    kind: str, tactic: str, *inputs: str, name: str = "down_proj_myl0_69", nodes: tuple[str, ...] = (NODE,)
) -> dict[str, Any]:
    """A layer as TensorRT 10 has it in JSON, with one output."""
    tensors = [
        {"Name": f"__mye55951_{n}", "Location": "Device", "Dimensions": [1, 40, 256], "Format/Datatype": dtype}
        for n, dtype in enumerate((*inputs, "Half"))
    ]
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": tensors[:-1],
        "Outputs": tensors[-1:],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def verdict(*rows: dict[str, Any]) -> BuiltProduct:
    inspected = json.dumps({"Layers": rows, "Bindings": ["input_ids", "logits"]})
    [product] = built_products(read_layers(inspected), [NODE])
    assert product.module == MODULE
    return product


@pytest.mark.parametrize(
    ("kind", "tactic", "inputs"),
    [
        ("gemm", INT8_GEMM, ("Int8",)),
        ("gemm", INT8_GEMM, ("Int8", "Int8", "Float", "Float")),  # weight, alpha and beta among the inputs
        ("fusion", INT8_FUSION, ("Int8", "Half")),
        ("kgen", INT8_FUSION, ("Half", "Int8")),
        ("CaskGemmMatrixMultiply", INT8_GEMM, ("Row major Int8 format",)),
        ("CaskConvolution", CASK, (PHRASE,)),
        ("CaskConvolution", CASK, (f"{PHRASE}.",)),
        ("CaskConvolution", CASK, ("Channel major Int8 format where channel % 4 == 0",)),
    ],
)
def test_int8_kernels(kind: str, tactic: str, inputs: tuple[str, ...]) -> None:
    """Whatever the layer is called; and what behind it reads its float output says nothing."""
    epilogue = row("kgen", EPILOGUE, "Half", name="__myl_AddCastMean_myl0_68", nodes=("norm/Add", NODE))
    assert verdict(row(kind, tactic, *inputs), epilogue) == BuiltProduct(MODULE, True, (tactic,))


@pytest.mark.parametrize(
    ("kind", "tactic", "inputs", "reads"),
    [
        ("gemm", HALF_GEMM, ("Half",), "Half"),
        ("fusion", f"{HALF_GEMM}_by_fusion_tactic", ("Half", "Half"), "Half"),
        ("gemm", "ampere_h16816gemm_256x128_ldg8_nn_v1", ("Half", "Int8"), "Half, Int8"),  # an int8 weight alone
        ("gemm", HALF_GEMM, ("Half", "Int8"), "Half, Int8"),
        ("gemm", "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize32x32x64", ("Float",), "Float"),
        ("CaskGemmMatrixMultiply", "sm50_xmma_cublas_gemvx_f16f16_f32_f32_tn", ("Row major linear FP16",), ""),
        ("gemm", "", ("UInt8",), "UInt8"),
    ],
)
def test_float_kernels(kind: str, tactic: str, inputs: tuple[str, ...], reads: str) -> None:
    """Whatever integers are read before them."""
    prologue = row("kgen", "__myl_CastMul_0x4d3a", "Int8", name="__myl_CastMul_myl0_68")
    product = verdict(prologue, row(kind, tactic, *inputs))
    assert not product.int8
    assert product.kernels == (tactic or kind,)
    assert product.why == f"layer down_proj_myl0_69 ({kind}) reads {reads or inputs[0]}"


def test_attention_is_no_product_of_ours() -> None:
    """It may name the linear whose output it reads."""
    attention = row(
        "kgen", "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a", "Half", "Half", name="_gemm_mha_v2_myl0_59"
    )
    assert verdict(row("gemm", INT8_GEMM, "Int8"), attention) == BuiltProduct(MODULE, True, (INT8_GEMM,))


def test_a_product_and_its_epilogue_in_generated_kernels() -> None:
    """No name tells which of them multiplies: it is the one that reads integers, if one does."""
    product = row("kgen", "__myl_FcMul_0x1", "Int8", "Float", name="__myl_FcMul_myl0_1")
    epilogue = row("kgen", EPILOGUE, "Half", name="__myl_AddCastMean_myl0_2")
    assert verdict(product, epilogue).int8
    found = verdict(epilogue)
    assert (found.int8, found.why) == (False, "layer __myl_AddCastMean_myl0_2 (kgen) reads Half")


@pytest.mark.parametrize(("kind", "tactic"), [("gemm", HALF_GEMM), ("kgen", "__myl_FcMul_0x1")])
def test_every_profile_counts(kind: str, tactic: str) -> None:
    prefill = row("fusion", INT8_FUSION, "Int8")
    decode = row(kind, tactic, "Half", name="down_proj_myl1_3 [profile 1]")
    found = verdict(prefill, decode)
    assert found == BuiltProduct(
        MODULE, False, (INT8_FUSION, tactic), f"layer down_proj_myl1_3 [profile 1] ({kind}) reads Half"
    )
    assert verdict(prefill, {**prefill, "Name": "down_proj_myl1_3 [profile 1]"}).int8


def test_layers_that_say_nothing() -> None:
    """Without detailed verbosity there are only names, and some layers compute no node."""
    reformat = {
        "Name": "Reformatting CopyNode for Input Tensor 0 to down_proj",
        "LayerType": "Reformat",
        "Inputs": [
            {"Name": "x", "Location": "Device", "Dimensions": [1, 3], "Format/Datatype": "Row major linear FP32"}
        ],
        "Outputs": [
            {"Name": "y", "Location": "Device", "Dimensions": [1, 3], "Format/Datatype": "Row major Int8 format"}
        ],
        "ParameterType": "Reformat",
        "Origin": "REFORMAT",
        "TacticValue": "0x00000000000003e8",
        "StreamId": 0,
        "Metadata": "",
    }
    [product] = built_products(read_layers(json.dumps({"Layers": ["[trainStation1]", reformat]})), [NODE])
    assert product == BuiltProduct(MODULE, False, (), "no layer of the engine names it")
