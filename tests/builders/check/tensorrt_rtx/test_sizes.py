"""A block of the size that real models have: hidden 4096, 32 heads of 128 channels, 8 kv heads, one layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders.check import check
from builders.check.tensorrt_rtx import compile_apart
from builders.nvidia.profiles import single_profile
from exporters.export import Source, export
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from smoothquant.settings import SmoothingSettings
from tests.lacking import require_compiler
from tests.writers import onnx_writer

FORMS = [("per-token", "fp32"), ("per-token", "fp16"), ("per-tensor", "fp16")]
PRODUCTS = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of it: per-token-fp32/, ..."""
    require_compiler()
    root = tmp_path_factory.mktemp("block")
    save_random_llama(root / "model", hidden=4096, intermediate=11008, layers=1, vocabulary=512)
    model = open_model(root / "model")
    widths = ((model.linear(0, role), model.family.shape(role, model.geometry)[1]) for role in model.quantized_roles)
    seen = {name: torch.ones(width) for name, width in widths}
    source = Source(model, SmoothingSettings(groups="none"), seen)
    export(source, [onnx_writer(root / f"{act}-{body}", act, body=body) for act, body in FORMS])
    (root / "model/model.safetensors").unlink()
    return root


@pytest.mark.parametrize(("act", "body"), FORMS)
def test_a_block_of_realistic_size(act: str, body: str, block: Path) -> None:
    profile = single_profile(batch=4, tokens=512, past=1536)
    found = check(block / f"{act}-{body}", compile=lambda g: compile_apart(g.path, profile, g.symbols))
    assert found.faults == []
    assert [verdict.module for verdict in found.verdicts] == [f"model.layers.0.{name}" for name in PRODUCTS]
    assert found.kinds["Int8 gemm"] == 4
    made = found.compilation
    assert made is not None
    weights = 4096 * (4096 + 2048 + 4096 + 3 * 11008)
    assert made.weight_bytes == pytest.approx(weights, rel=0.1)  # int8 in the engine, too
    if body == "fp16":  # attention is fused: no product but the output head's
        assert found.kinds["Half gemm"] == 1
    else:
        assert found.kinds["Float gemm"] == 3
