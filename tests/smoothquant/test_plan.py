"""A plan's layers are what its files hold, fold exactly, and are refused where they are not this model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporters.export import Source
from recipes.families import open_model
from smoothquant.artifacts.plan import PLAN
from smoothquant.contract import TOLERANCE, Contract
from smoothquant.errors import UserError
from smoothquant.outputs import MANIFEST
from smoothquant.plan import layer_file, read_plan
from smoothquant.scheme import PER_TOKEN
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.families.case import Case
from tests.models import save_llama
from tests.outputs import agree
from tests.plans import LAYOUTS, change_layer, makers, plan_of, tensors_of, write_plan

Q, K, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    return makers(tmp_path_factory)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_come_back(name: str, planned: Callable[[str], Source]) -> None:
    source = planned(name)
    for index in range(source.model.geometry.layers):
        written, found = tensors_of(plan_of(source).folder, index), plan_of(source).layer(source.model, index)
        again = found.tensors(source.model, index)
        assert again.keys() == written.keys()
        assert all(again[key].equal(tensor) for key, tensor in written.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_float_model_stays_and_linears_are_the_plans(name: str, planned: Callable[[str], Source]) -> None:
    """Smoothed in float it is the original, with its own biases; quantized it has the plan's weights and biases."""
    source = planned(name)
    contract, corrected = Contract(source.model), 0
    layers = smoothed_layers(
        source.model, source.input_absmax, source.settings, output_absmax=source.output_absmax, plan=source.plan
    )
    for layer in layers:
        contract.check(layer)
        held, quantized = plan_of(source).layer(source.model, layer.index), quantize_layer(layer)
        assert held.rounded.keys() == quantized.linears.keys() == set(source.model.quantized_roles)
        for role, linear in quantized.linears.items():
            rounded, bias = held.rounded[role], layer.bias(role)
            assert linear.weight.equal(rounded.weight)
            assert linear.weight_scale.equal(rounded.weight_scale)
            assert (linear.bias is None) == (rounded.bias is None) == (bias is None)
            if linear.bias is not None and rounded.bias is not None and bias is not None:
                assert linear.bias.equal(rounded.bias)
                assert not linear.bias.equal(bias)
                corrected += 1
    assert contract.finish() < TOLERANCE
    assert bool(corrected) == (name in ("qwen2", "opt", "bloom"))


def test_a_planned_layer_needs_no_act_scales_but_for_caches(planned: Callable[[str], Source]) -> None:
    source = planned("llama")
    bare, whole = (
        next(smoothed_layers(source.model, source.input_absmax, source.settings, 0, outputs, plan=source.plan))
        for outputs in ({}, source.output_absmax)
    )
    assert bare.cache_scales is None
    assert whole.cache_scales is not None
    assert all(bare.input_absmax[role].equal(whole.input_absmax[role]) for role in whole.input_absmax)


@pytest.fixture
def copy_of(planned: Callable[[str], Source], tmp_path: Path) -> Callable[[str], tuple[Source, Path]]:
    """A layout and a copy of its plan, to break."""

    def copy(name: str) -> tuple[Source, Path]:
        source = planned(name)
        return source, Path(shutil.copytree(plan_of(source).folder, tmp_path / "copy"))

    return copy


def refused(source: Source, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_plan(folder).for_model(source.model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor | None]], str]] = {
    "another linear": (
        lambda own: {"model.layers.0.mlp.other_proj.weight": own[Q + ".weight"]},
        "tensor model.layers.0.mlp.other_proj.weight; expected tensors of layer 0 of this model",
    ),
    "another layer": (
        lambda own: {"model.layers.1.mlp.down_proj.weight": own[DOWN + ".weight"]},
        "tensor model.layers.1.mlp.down_proj.weight; expected tensors of layer 0",
    ),
    "another shape": (
        lambda own: {Q + ".weight": own[Q + ".weight"][1:].clone()},
        f"tensor {Q}.weight is int8 [63, 64]; expected int8 [64, 64]",
    ),
    "another dtype": (
        lambda own: {DOWN + ".input_absmax": own[DOWN + ".input_absmax"].double()},
        f"tensor {DOWN}.input_absmax is float64 [128]; expected float32 [128]",
    ),
    "-128": (
        lambda own: {Q + ".weight": torch.full_like(own[Q + ".weight"], -128)},
        f"tensor {Q}.weight holds others than numbers within +-127",
    ),
    "a scale of 0": (
        lambda own: {DOWN + ".smoothing_scale": torch.zeros(128)},
        f"tensor {DOWN}.smoothing_scale holds others than finite numbers above 0",
    ),
    "a weight_scale of 0": (
        lambda own: {Q + ".weight_scale": torch.zeros(64)},
        f"tensor {Q}.weight_scale holds others than finite numbers above 0",
    ),
    "NaN": (
        lambda own: {DOWN + ".input_absmax": torch.full((128,), float("nan"))},
        f"tensor {DOWN}.input_absmax holds others than finite numbers from 0 on",
    ),
    "an infinite scale": (
        lambda own: {DOWN + ".smoothing_scale": torch.full((128,), float("inf"))},
        f"tensor {DOWN}.smoothing_scale holds others than finite numbers above 0",
    ),
    "no range": (lambda own: {DOWN + ".input_absmax": None}, f"tensor {DOWN}.input_absmax is missing"),
    "no weight_scale": (
        lambda own: {Q + ".weight_scale": None},
        f"tensor {Q}.weight without {Q}.weight_scale; expected both or none",
    ),
    "no weight": (
        lambda own: {Q + ".weight": None},
        f"tensor {Q}.weight_scale without {Q}.weight; expected both or none",
    ),
    "one scale of a cache": (
        lambda own: {"model.layers.0.key.cache_scale": torch.tensor(0.1)},
        "without model.layers.0.value.cache_scale; expected both or none",
    ),
    "a bias that the model lacks": (
        lambda own: {Q + ".bias": torch.zeros(64)},
        f"tensor {Q}.bias; expected tensors of layer 0 of this model",
    ),
    "scales that differ": (
        lambda own: {K + ".smoothing_scale": 2 * own[K + ".smoothing_scale"]},
        f"{Q}.smoothing_scale and {K}.smoothing_scale differ",
    ),
    "a scale that the others lack": (
        lambda own: {Q + ".smoothing_scale": None},
        f"{Q}.smoothing_scale and {K}.smoothing_scale differ",
    ),
    "ranges that differ": (
        lambda own: {K + ".input_absmax": 2 * own[K + ".input_absmax"]},
        f"{Q}.input_absmax and {K}.input_absmax differ",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_tensors(fault: str, copy_of: Callable[[str], tuple[Source, Path]]) -> None:
    source, folder = copy_of("llama")
    change, said = BAD[fault]
    change_layer(folder, 0, change(tensors_of(folder, 0)))
    assert f"{folder / layer_file(0)}: " in refused(source, folder)
    assert said in refused(source, folder)


def test_a_bias_stands_beside_its_weight(copy_of: Callable[[str], tuple[Source, Path]]) -> None:
    source, folder = copy_of("qwen2")
    change_layer(folder, 0, {Q + ".weight": None, Q + ".weight_scale": None})
    assert f"tensor {Q}.bias without {Q}.weight; expected both or none" in refused(source, folder)


def test_scales_of_other_groups(copy_of: Callable[[str], tuple[Source, Path]]) -> None:
    source, folder = copy_of("llama")
    record = json.loads((folder / PLAN).read_text())
    record["smoothing"]["groups"] = "paper"
    (folder / PLAN).write_text(json.dumps(record))
    agree(folder)
    name = "model.layers.0.self_attn.o_proj.smoothing_scale"
    assert f"tensor {name}; expected scales of linears that groups 'paper' smooth in family llama" in refused(
        source, folder
    )


def test_a_plan_of_another_model(planned: Callable[[str], Source], tmp_path: Path) -> None:
    source = planned("llama")
    other = open_model(save_llama(tmp_path / "other", seed=7))
    said = refused(replace(source, model=other), plan_of(source).folder)
    assert f"a plan for model {source.model.checkpoint.fingerprint}; expected one for model" in said


RECORDS = {
    "another family": ({"family": "opt"}, "a plan for family opt; expected one for family llama"),
    "linears in float that it lacks": (
        {"scheme": replace(PER_TOKEN, float_linears=("model.layers.9.mlp.down_proj",))},
        "model.layers.9.mlp.down_proj in float; expected linears of this model",
    ),
    "a part of what reads one input in float": (
        {"scheme": replace(PER_TOKEN, float_linears=(K,))},
        f"{K} stays in float, and {Q} does not; expected linears that read one input together",
    ),
}


@pytest.mark.parametrize("fault", RECORDS)
def test_bad_records(fault: str, tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    changes, said = RECORDS[fault]
    folder = write_plan(case.model, case.act_scales, tmp_path / "plan", **changes)
    with pytest.raises(UserError, match=said):
        read_plan(folder).for_model(case.model)


def test_a_plan_for_other_lengths(tmp_path: Path) -> None:
    case = Case("phi3-longrope-long", tmp_path)
    folder = write_plan(case.model, case.act_scales, tmp_path / "plan")
    plan = read_plan(folder).for_model(case.model)
    assert plan.facts.max_positions == case.model.geometry.max_positions
    with pytest.raises(UserError, match=r"a plan for max_positions \d+; expected one for max_positions \d+.*--max-len"):
        plan.for_model(open_model(case.folder))


def test_damaged_and_foreign_folders(copy_of: Callable[[str], tuple[Source, Path]], tmp_path: Path) -> None:
    source, folder = copy_of("llama")
    place = folder / layer_file(1)
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{place}: its content is not what was written" in refused(source, folder)
    place.write_bytes(content[:100])
    agree(folder)
    assert f"{place}: cannot be read" in refused(source, folder)
    place.unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    agree(folder, files={name: facts for name, facts in manifest["files"].items() if name != layer_file(1)})
    assert f"{place}: cannot be read" in refused(source, folder)
    (folder / PLAN).write_text('{"model": 7}')
    agree(folder)
    assert f"{folder / PLAN}" in refused(source, folder)
    assert "no such" in refused(source, tmp_path / "nowhere") or "not an output" in refused(
        source, tmp_path / "nowhere"
    )
    assert "not an output of this tool" in refused(source, source.model.checkpoint.folder)


def test_settings_of_another_kind(tmp_path: Path) -> None:
    """The record says how scales are folded: one that no format knows is refused when it is read."""
    case = Case("llama", tmp_path)
    folder = write_plan(case.model, case.act_scales, tmp_path / "plan")
    record = json.loads((folder / PLAN).read_text())
    record["smoothing"]["groups"] = "all"
    (folder / PLAN).write_text(json.dumps(record))
    agree(folder)
    with pytest.raises(UserError, match="groups 'all'; expected one of"):
        read_plan(folder)
