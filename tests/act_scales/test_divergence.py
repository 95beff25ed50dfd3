"""What one pass backward says of every input is what a pass forward finds, with that input alone in INT8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from act_scales.search.budget import linears_in, with_losses
from act_scales.search.divergence import TOKENS, Trail, divergence
from act_scales.search.passes import SearchTarget
from smoothquant.artifacts.plan import NEAREST, LinearChoice
from smoothquant.layers import float_layer
from smoothquant.scheme import scheme_of
from smoothquant.stream import runnable
from smoothquant.sweep import sweep
from tests.act_scales.search_cases import SETTINGS, kl_of
from tests.families.case import Case, run
from tests.models import sample_ids

LAYOUTS = ("llama", "opt", "falcon-7b", "mixtral", "gemma3", "qwen3", "opt-350m", "granite")
IDS = sample_ids(8, 64, seed=11)


@pytest.mark.parametrize(("layout", "act"), [*((name, "per-token") for name in LAYOUTS), ("llama", "per-tensor")])
def test_it_is_the_measured_kl(layout: str, act: str, tmp_path: Path) -> None:
    case, scheme = Case(layout, tmp_path), scheme_of(act)
    model, layers = case.model, list(case.smoothed(SETTINGS))
    trail = Trail()
    reference = sweep(model, tuple(IDS), [trail])
    assert trail.sequences == len(IDS)
    done: list[int] = []
    target = SearchTarget(model, scheme, SETTINGS, width=64)
    found = divergence(target, layers.__getitem__, trail, reference, done.append)
    assert done == list(range(1, model.geometry.layers + 1))
    assert sorted(name for names in found for name in names) == sorted(name for name, _ in model.linears())
    exact = run(model, IDS, (float_layer(model, index) for index in range(len(layers))), torch.float64)
    every, measured = {name for name, _ in model.linears()}, {}
    for names in found:
        alone = replace(scheme, float_linears=tuple(sorted(every - set(names))))
        made = run(model, IDS, (runnable(layer, alone) for layer in layers), torch.float64)
        measured[names] = kl_of(exact, made)
    quarter = len(found) // 4
    won, most = (
        sum(measured[names] for names in sorted(found, key=order.__getitem__)[-quarter:]) for order in (found, measured)
    )
    if layout == "mixtral":  # most of it are tokens that change their experts, which no slope tells
        assert won > 0.8 * most
    else:
        assert won > 0.95 * most
        assert 0.7 < sum(found.values()) / sum(measured.values()) < 1.4


def test_the_first_tokens_alone(tmp_path: Path) -> None:
    """Of long texts, the batches that begin within the first `TOKENS`."""
    model, trail = Case("llama", tmp_path).model, Trail()
    sweep(model, tuple(sample_ids(2 * TOKENS // 64 + 5, 64, seed=1)), [trail])
    assert trail.sequences == TOKENS // 64
    assert [sum(map(len, batches)) for batches in trail.inputs] == [trail.sequences] * model.geometry.layers


def test_losses_by_numbers() -> None:
    linears = tuple(LinearChoice(name, numbers, NEAREST, {}) for name, numbers in (("a", 30), ("b", 10), ("c", 5)))
    found = with_losses(linears, {("a", "b"): 0.4, ("c",): 0.1})
    assert [one.loss for one in found] == pytest.approx([0.3, 0.1, 0.1])


def test_linears_go_by_what_they_win_per_byte(tmp_path: Path) -> None:
    """One input that costs all the KL is the first to stay in float, wherever it lies."""
    model = Case("llama", tmp_path).model
    linears = tuple(LinearChoice(name, rows * columns, NEAREST, {}) for name, (rows, columns) in model.linears())
    down = "model.layers.1.mlp.down_proj"
    marked = tuple(replace(one, loss=1.0 if one.name == down else 1e-9) for one in linears)
    share = next(one.numbers for one in linears if one.name == down) / sum(one.numbers for one in linears)
    assert linears_in(model, marked, share) == (down,)
