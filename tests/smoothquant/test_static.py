"""Linears that one static scale would ruin: found, left in float, and exact in every reader."""

from __future__ import annotations

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
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.contract import relative_error
from smoothquant.errors import UserError
from smoothquant.scheme import ACTIVATIONS, scheme_of
from smoothquant.sensitivity import measured
from smoothquant.settings import SmoothingSettings
from smoothquant.static import linears_to_keep, numbers_of
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.exporters.onnx.graphs import Runner
from tests.families.case import SETTINGS, Case, run
from tests.families.differences import token_errors
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


def even(case: Case) -> dict[str, torch.Tensor]:
    """Mean squares of an ordinary token: nowhere a spike."""
    return {name: torch.full((columns,), 1 / 16) for name, (_, columns) in case.model.linears()}


def test_a_spike_is_found_and_its_linear_named(case: Case) -> None:
    scales, squares = spiking(case), even(case)
    assert linears_to_keep("auto", case.model, scales, NONE, squares) == (DOWN,)
    assert linears_to_keep("auto", case.model, scales, NONE) == (DOWN,)  # by the guess, too
    assert linears_to_keep("auto", case.model, scales, SmoothingSettings(0.5, "paper"), squares) == (DOWN,)
    flat = {name: torch.ones_like(values) for name, values in scales.items()}
    assert linears_to_keep("auto", case.model, flat, NONE, squares) == ()


def test_mean_squares_tell_spikes_from_large_channels(case: Case) -> None:
    """A channel that is large on every token is signal, and its linear needs no float; maxima cannot say so."""
    scales, squares = spiking(case), even(case)
    squares[DOWN][7] = 1000.0**2 / 16
    assert linears_to_keep("auto", case.model, scales, NONE, squares) == ()


def test_linears_of_one_input_are_kept_together(case: Case) -> None:
    scales = spiking(case)
    scales["model.layers.0.self_attn.k_proj"] = (
        scales["model.layers.0.self_attn.k_proj"].clone().index_fill_(0, torch.tensor(3), 999.0)
    )
    attention = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert linears_to_keep("auto", case.model, scales, NONE) == (*attention, DOWN)


def test_linears_of_one_input_are_kept_together_where_no_norm_is_before_them(tmp_path: Path) -> None:
    """A post-norm decoder: nothing folds into what q, k and v read, and yet it is one input."""
    model = Case("opt-350m", tmp_path).model
    kept = linears_to_keep("k", model, {}, NONE)
    assert kept == tuple(f"model.decoder.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv")


def test_choices(case: Case) -> None:
    scales, settings = spiking(case), SmoothingSettings(0.5)
    assert linears_to_keep("none", case.model, scales, NONE) == ()
    chosen = linears_to_keep("up,o", case.model, scales, settings)
    assert {name.rpartition(".")[2] for name in chosen} == {"gate_proj", "up_proj", "o_proj"}
    with pytest.raises(
        UserError, match="linears 'fc1' to keep in float; expected auto, none, a budget as in 5%, or of"
    ):
        linears_to_keep("fc1", case.model, scales, settings)


@pytest.mark.parametrize("percent", [8.0, 20.0, 45.5, 90.0])
def test_a_budget_buys_what_costs_most_and_no_more(percent: float, case: Case) -> None:
    model, scales, squares = case.model, case.act_scales.input_absmax, case.act_scales.input_mean_square
    kept = linears_to_keep(f"{percent}%", model, scales, SETTINGS, squares)
    total = numbers_of(model)
    assert 0 < numbers_of(model, kept) <= percent / 100 * total
    inputs = measured(model, scales, squares, SETTINGS)
    left = [one for one in inputs if one.names[0] not in kept]
    least = min(one.loss / one.numbers for one in inputs if one.names[0] in kept)
    for one in left:  # what is passed over is worth less, or does not fit
        assert one.loss / one.numbers <= least or one.numbers > percent / 100 * total - numbers_of(model, kept)


@pytest.mark.parametrize("choice", ["0%", "-5%", "200%", "100%", "5 %x", "%", "5%,down", "nan%", "1e1%"])
def test_an_impossible_budget_is_one_line(choice: str, case: Case) -> None:
    with pytest.raises(UserError, match=r"a budget of .* for linears in float; expected above 0% and below 100%"):
        linears_to_keep(choice, case.model, case.act_scales.input_absmax, SETTINGS)
    with pytest.raises(UserError, match=r"0\.01% .* none of this model fits into; expected at least \d+\.\d\d%"):
        linears_to_keep("0.01%", case.model, case.act_scales.input_absmax, SETTINGS)


@pytest.mark.parametrize("layout", ["mixtral", "falcon-7b", "gemma2", "opt-350m", "phi3", "bloom"])
def test_the_loss_is_that_of_the_stream(layout: str, tmp_path: Path) -> None:
    """In every layout, of experts, parallel branches, norms behind a branch and behind the sum: the noise that the real
    arithmetic puts on the output of a layer whose MLP's last linears alone are quantized, on ordinary tokens."""
    case = Case(layout, tmp_path)
    model, scales = case.model, case.act_scales
    inputs = measured(model, scales.input_absmax, scales.input_mean_square, SETTINGS)
    assert {name for one in inputs for name in one.names} == {name for name, _ in model.linears()}
    assert sum(one.numbers for one in inputs) >= numbers_of(model) * 0.99
    ids = sample_ids()
    states, positions = decoder.embed(model, ids, torch.float32), patterns(model, ids.shape[1], torch.float32)
    layer = next(iter(case.smoothed(SETTINGS)))
    ends = [role for role in model.quantized_roles if role.startswith("down")]
    others = tuple(model.linear(0, role) for role in model.quantized_roles if role not in ends)
    quantized = quantize_layer(layer, scheme_of("per-tensor", float_linears=others))
    with torch.no_grad():
        exact = decoder.forward(model, layer, states, positions)
        noisy = decoder.forward(model, quantized.runnable(ACTIVATIONS["per-tensor"]), states, positions)
    found = ((noisy - exact).square().sum(-1) / exact.square().sum(-1)).mean().item()
    names = {model.linear(0, role) for role in ends}
    expected = sum(one.loss for one in inputs if names & set(one.names))
    assert 1 / 4 < found / expected < 4


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
