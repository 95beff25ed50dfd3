"""Linears that one static scale would ruin: found, left in float, and exact in every reader."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from act_scales.text import Text
from builders.onnxruntime import build
from builders.transformers import TransformersEngine
from builders.validate import validate_engines
from exporters.export import Source, export
from smoothquant.contract import relative_error
from smoothquant.errors import UserError
from smoothquant.quantization import input_scale, quantize_tensor
from smoothquant.scheme import scheme_of
from smoothquant.settings import SmoothingSettings
from smoothquant.static import LIMIT, linears_to_keep, ruined_linears, spread
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.exporters.onnx.graphs import Runner
from tests.families.case import Case, run
from tests.families.properties import token_errors
from tests.models import sample_ids
from tests.writers import onnx_writer, w8a8_writer

NONE = SmoothingSettings(groups="none")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("static"))


def spiking(case: Case) -> dict[str, torch.Tensor]:
    """Calibrated maxima without outliers, but for one spike before one down_proj."""
    scales = {name: torch.ones(columns) for name, (_, columns) in case.model.linears()}
    scales[DOWN][7] = 1000.0
    return scales


def test_the_limit_is_ten_decibels() -> None:
    """Normal values in channels of one range, beside one channel of LIMIT times that range."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    x = x / x.abs().amax(dim=0) * 1.0
    ranges = torch.cat([x.abs().amax(dim=0), torch.tensor([LIMIT])])
    integers, scale = quantize_tensor(x, input_scale(ranges))
    sqnr = 10 * math.log10(x.square().sum() / (integers * scale - x).square().sum())
    assert sqnr == pytest.approx(10, abs=1.5)
    assert spread(ranges) == pytest.approx(LIMIT, rel=1e-6)


def test_dead_channels_do_not_count() -> None:
    assert spread(torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0])) == 1
    assert spread(torch.zeros(4)) == 1


def test_a_spike_is_found_and_its_linear_named(case: Case) -> None:
    scales = spiking(case)
    assert ruined_linears(case.model, scales, NONE) == (DOWN,)
    assert ruined_linears(case.model, scales, SmoothingSettings(0.5)) == ()  # 1000 ** 0.5 is 31.6: the fold reaches it
    assert ruined_linears(case.model, scales, SmoothingSettings(0.5, "paper")) == (DOWN,)  # where up -> down folds
    assert ruined_linears(case.model, {name: torch.ones_like(v) for name, v in scales.items()}, NONE) == ()


def test_linears_of_one_input_are_kept_together(case: Case) -> None:
    scales = spiking(case)
    scales["model.layers.0.self_attn.k_proj"] = (
        scales["model.layers.0.self_attn.k_proj"].clone().index_fill_(0, torch.tensor(3), 99.0)
    )
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert ruined_linears(case.model, scales, NONE) == (*attention, DOWN)


def test_linears_of_one_input_are_kept_together_where_no_norm_is_before_them(tmp_path: Path) -> None:
    """A post-norm decoder: nothing folds into what q, k and v read, and yet it is one input."""
    model = Case("opt-350m", tmp_path).model
    kept = linears_to_keep("k", model, {}, NONE)
    assert kept == tuple(f"model.decoder.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv")


def test_choices(case: Case) -> None:
    scales, settings = spiking(case), SmoothingSettings(0.5)
    assert linears_to_keep("none", case.model, scales, NONE) == ()
    assert linears_to_keep("auto", case.model, scales, NONE) == (DOWN,)
    chosen = linears_to_keep("up,o", case.model, scales, settings)
    assert {name.rpartition(".")[2] for name in chosen} == {"gate_proj", "up_proj", "o_proj"}
    with pytest.raises(UserError, match="linears 'fc1' to keep in float; expected auto, none, or of down, gate, k"):
        linears_to_keep("fc1", case.model, scales, settings)


@pytest.mark.parametrize("layout", ["llama-biased", "mixtral", "phi3"])
def test_every_reader_agrees(layout: str, tmp_path: Path) -> None:
    """ONNX Runtime, transformers and the validation compute the same static model with linears in float."""
    case = Case(layout, tmp_path)
    scales, settings, ids = case.act_scales.input_absmax, SmoothingSettings(0.5), sample_ids(8, 24, seed=3)
    kept = linears_to_keep("down,gate", case.model, scales, settings)
    source = Source(case.model, settings, scales, {"model": case.model.checkpoint.fingerprint})
    export(
        source,
        [
            onnx_writer(tmp_path / "onnx", "per-tensor", kept=kept),
            w8a8_writer(tmp_path / "w8a8", "per-tensor", kept=kept),
        ],
    )
    forms = []
    scheme = scheme_of("per-tensor", float_linears=kept)
    for layer in smoothed_layers(case.model, scales, settings):
        forms.append(quantize_layer(layer, scheme).runnable(scheme.activations))
    expected = run(case.model, ids, iter(forms))
    plain = case.w8a8(ids, "per-tensor", torch.float32)
    assert relative_error(expected, plain) > 1e-3  # it is another model

    manifest = build(tmp_path / "onnx", tmp_path / "engine")
    names = [t.name for t in onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False).graph.initializer]
    assert manifest.results["kernels"]["quantized"] == sum(name.endswith("weight_int8") for name in names) == 2 * 2
    assert manifest.origin.scheme.float_linears == kept
    assert token_errors(Runner(tmp_path / "onnx/model.onnx").run(ids)[0], expected).median() <= 1e-5
    assert token_errors(TransformersEngine(tmp_path / "w8a8").logits(ids), expected).median() <= 1e-5
    text = Text(tuple(ids), "sample")
    found = validate_engines({"engine": tmp_path / "engine"}, case.model, text, exact=True)[0]
    assert {linear.role.partition(".")[0] for linear in found.linears} == {"q", "k", "v", "o"}
    assert found.exactness.engine < 0.05
    assert replace(found.metrics, tokens=0).kl_mean < 0.05


def test_bfloat16_graphs_are_for_tensorrt(case: Case, tmp_path: Path) -> None:
    export(case.source, [onnx_writer(tmp_path / "onnx", body="bf16")])
    model = onnx.load(tmp_path / "onnx/model.onnx")
    onnx.checker.check_model(str(tmp_path / "onnx/model.onnx"), full_check=True)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    assert onnx.TensorProto.FLOAT16 not in kinds
    with pytest.raises(UserError, match="ONNX Runtime lacks operators for a bfloat16 graph"):
        build(tmp_path / "onnx", tmp_path / "engine")
