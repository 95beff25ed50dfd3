"""What TensorRT's compiler fuses: the spelling of a graph decides it, so the spelling is tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builders.check.tensorrt_rtx import Compilation, compile_onnx
from builders.nvidia.profiles import single_profile
from builders.onnx_graph import OnnxGraph
from tests.exporters.onnx.graphs import export_onnx, source_of
from tests.lacking import with_compiler

pytestmark = with_compiler
HEADS = {"hidden_size": 256, "head_dim": 64}  # for smaller ones there are no attention kernels
LAYER = "model.layers.1"
NORMED = ("residual/Add", "post_attention_layernorm/Pow", "post_attention_layernorm/Div")


def compiled(path: Path) -> Compilation:
    found = compile_onnx(path, single_profile(2, 128, 128), OnnxGraph(path).symbols)
    assert not found.errors, found.errors
    return found


def one_kernel(found: Compilation, *nodes: str) -> bool:
    """Whether one kernel computes all these nodes."""
    return any({f"{LAYER}.{node}" for node in nodes} <= set(layer.nodes) for layer in found.layers)


@pytest.mark.parametrize("activations", ["per-token", "per-tensor"])
@pytest.mark.parametrize("body", ["fp32", "fp16", "bf16"])
def test_kernels(body: str, activations: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Residual, norm and quantization are one kernel; so is the attention, in half precision."""
    out = export_onnx(source_of(make_llama(**HEADS)), tmp_path / "out", body=body, activations=activations)
    found = compiled(out / "model.onnx")
    assert one_kernel(found, *NORMED, "mlp.gate_up_proj/QuantizeLinear")
    attention = (f"attention/{node}" for node in ("MatMul", "Softmax", "MatMul.1"))
    assert one_kernel(found, *attention) == (body != "fp32")
