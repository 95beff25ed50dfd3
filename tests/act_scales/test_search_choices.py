"""What a search hears of a layer, and what it chooses by: outliers, linears of zeros, experts without tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_scales.search import Wanted, search
from act_scales.search.passes import LEAST, Pass, SearchTarget, width_for
from act_scales.search.scales import Policy
from act_scales.search.statistics import Heard, Statistics
from act_scales.store import load_act_scales
from act_scales.text import Text
from smoothquant.artifacts.plan import BALANCED, FEEDBACK, NONE, GroupChoice
from smoothquant.layers import float_layer
from smoothquant.outputs import load_manifest
from smoothquant.rounding import Hessian
from smoothquant.scheme import PER_TENSOR, PER_TOKEN, scheme_of
from tests import zoo
from tests.act_scales.search_cases import SETTINGS, TEXT
from tests.families.case import Case
from tests.models import open_llama, sample_ids, save_llama


@pytest.mark.parametrize("act", ["per-token", "per-tensor"])
def test_no_smoothing_loses_where_there_are_outliers_and_is_near_where_there_are_none(act: str, tmp_path: Path) -> None:
    """The same function with and without channels that reach 64 times as far."""
    found = {}
    for outlier in (1.0, 64.0):
        folder = tmp_path / f"{outlier:g}"
        zoo.build("llama", outlier=outlier).save_pretrained(folder)
        policy = Policy("by group", (0.5, 0.8))
        found[outlier] = groups_of(folder, policy, act)
    for groups, least, most in ((found[1.0], 1.0, 2.0), (found[64.0], 5.0, float("inf"))):
        for one in groups:
            assert one.chosen == min(one.tried, key=lambda name: one.tried[name])
            assert set(one.tried) == {NONE, "0.5", "0.8", BALANCED}
            if one.through == "norm":
                assert least <= one.tried[NONE] / one.tried[one.chosen] < most


def groups_of(folder: Path, policy: Policy, act: str) -> Sequence[GroupChoice]:
    """The choices for the first layer."""
    model = open_llama(folder)
    under_way = Pass(SearchTarget(model, scheme_of(act), SETTINGS, 128), policy, TEXT.sequences[:9], TEXT.sequences[9:])
    under_way.take(float_layer(model, 0))
    return under_way.choices.groups


@pytest.mark.parametrize("act", ["per-token", "per-tensor"])
def test_linears_of_zeros(act: str, tmp_path: Path) -> None:
    """As blocks that are added to a trained model begin: nothing comes out of o and of down, or into down."""
    folder = save_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.mlp.up_proj"):
        tensors[f"model.layers.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = open_llama(folder)
    plan = search(model, TEXT, tmp_path / "plan", Wanted(scheme_of(act), SETTINGS, 0.3)).for_model(model)
    assert 0 < plan.facts.curve[0].kl < 0.1


def test_experts_that_no_token_reached(tmp_path: Path) -> None:
    """128 experts, 48 tokens to choose by: they are smoothed with the recipe's alpha, and lose nothing."""
    text = Text(tuple(sample_ids(4, 2)), "sample")
    case = Case("qwen3-moe-unnormed", tmp_path)
    plan = search(case.model, text, tmp_path / "plan", Wanted(PER_TENSOR, SETTINGS, 0.1)).for_model(case.model)
    silent = load_act_scales(plan.act_scales).silent
    assert silent
    inner = [one for one in plan.facts.groups if one.linears[0].rpartition(".")[0] in silent and len(one.linears) == 1]
    assert inner
    assert {one.chosen for one in inner} <= {"0.8", plan.facts.chosen.removeprefix("alpha ")}
    assert not {name for name in plan.float_linears if name.endswith("down_proj") and name.rpartition(".")[0] in silent}


def test_a_hessian_has_a_budget(llama_folder: Path, tmp_path: Path) -> None:
    model = open_llama(llama_folder)
    inputs = (64, 64, 64, 128)  # q k v, o, gate up, down

    def needed(width: int) -> int:
        return 8 * sum(channels * min(width, channels) for channels in inputs)

    assert width_for(model, needed(128)) == 128
    assert width_for(model, needed(128) - 1) == LEAST == 64
    assert width_for(model, 1) == LEAST
    plan = search(model, TEXT, tmp_path / "plan", Wanted(PER_TOKEN, SETTINGS, memory=1)).for_model(model)
    assert load_manifest(plan.folder).inputs["width"] == plan.facts.width == LEAST
    assert FEEDBACK in {one.rounding for one in plan.facts.linears}


@pytest.mark.parametrize("name", ["llama", "falcon-7b", "mixtral", "olmo2"])
def test_every_token_is_heard_once(name: str, tmp_path: Path) -> None:
    """Also where attention and MLP read one input, with another between; experts' tokens once for each expert."""
    case = Case(name, tmp_path)
    model = case.model
    heard, tokens = Statistics(model, 12 * 32, 256, sample=12 * 32), 12 * 32
    sweep = SearchTarget(model, PER_TOKEN, SETTINGS, 256).sweep(TEXT.sequences, heard)
    sweep.hear(float_layer(model, 0))
    for roles in model.inputs:
        role = next(role for role in roles if role != "router")
        found = heard.input(role)
        assert found is not None
        assert found.moments is not None
        if "." not in role:
            assert found.moments.tokens == len(found.x) == tokens
        elif len(roles) > 1:
            assert found.moments.tokens == len(found.x) == tokens * model.geometry.experts_per_token
        torch.testing.assert_close(found.moments.mean_square, found.x.square().mean(dim=0), rtol=1e-4, atol=1e-6)
        weight = found.token_weight(roles)
        assert weight.sum().item() == pytest.approx(1)
        assert len(weight.unique()) > 1


def test_tokens_weigh_by_what_they_give(llama_folder: Path) -> None:
    """The inverse of their outputs' squares, over the means of each linear."""
    model = open_llama(llama_folder)
    heard = Statistics(model, 12 * 32, 0, sample=12 * 32)
    SearchTarget(model, PER_TOKEN, SETTINGS, 0).sweep(TEXT.sequences, heard).hear(float_layer(model, 0))
    found = heard.input("q")
    assert found is not None
    source = float_layer(model, 0)
    squares = [(found.x @ source.weights[role].T).square().sum(dim=1) for role in ("q", "k", "v")]
    expected = 1 / torch.stack([each / each.mean() for each in squares]).mean(dim=0)
    torch.testing.assert_close(found.token_weight(("q", "k", "v")), expected / expected.sum(), rtol=1e-4, atol=0)
    assert found.energy("q") == pytest.approx(squares[0].mean().item(), rel=1e-5)


def test_moments_are_summed_where_the_input_is() -> None:
    hessian = Hessian(6, 4, "meta")
    hessian.add(torch.empty(3, 6, device="meta"))
    assert {moment.device.type for moment in hessian.moments} == {"meta"}


def test_the_signal_of_tokens_that_count() -> None:
    """The mean square of a linear's outputs over the tokens that came to it, by their weights."""
    squares = torch.tensor([4.0, 1.0, 1.0])
    parts = [torch.ones(3, 2), torch.ones(1, 2)]
    heard = Heard(None, parts, [{"up.0": squares}, {"up.1": torch.tensor([9.0])}], {"up.0": 6.0, "up.1": 9.0})
    heard.tokens = {"up.0": 3, "up.1": 1}
    weight = heard.token_weight(("up.0", "up.1"))
    torch.testing.assert_close(weight, torch.tensor([0.5, 2.0, 2.0, 1.0]) / 5.5)
    assert heard.energy("up.0") == 2
    assert heard.signal("up.0", weight) == pytest.approx((4 * 0.5 + 2 + 2) / 4.5)
    assert heard.signal("up.1", weight) == pytest.approx(9)
    assert heard.signal("up.2", weight) == 0
