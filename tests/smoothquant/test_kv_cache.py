"""Keys in an 8-bit cache: what divides them is undone by queries, and gives every pair of channels all steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from exporters.export import export
from exporters.huggingface import SmoothedWriter
from recipes.families import open_model
from smoothquant import kv_cache
from smoothquant.contract import relative_error
from smoothquant.fold import SmoothedLayer
from smoothquant.layers import float_layer
from smoothquant.quantization import QMAX
from smoothquant.settings import SmoothingSettings
from tests.families.case import Case, run
from tests.models import sample_ids

LINEAR = ("llama", "qwen2", "mixtral", "falcon-40b", "falcon-rw", "bloom", "opt", "phi3-partial", "phi3-longrope-long")
NORMED = ("qwen3", "qwen3-yarn")
UNTOUCHED = ("gemma3",)  # its norms hold gain - 1, which a power of two does not leave as it is
FOR_CACHE = SmoothingSettings(0.6, cache="own")
NAMES = ("gemma3", *LINEAR, *NORMED)


def smoothed(case: Case, settings: SmoothingSettings = FOR_CACHE) -> list[SmoothedLayer]:
    return list(case.smoothed(settings))


@pytest.mark.parametrize("layout", NAMES)
def test_the_function_stays(layout: str, tmp_path: Path) -> None:
    """In float64, the model with keys divided is the float model; without, the same folds differ in q and k alone."""
    case, ids = Case(layout, tmp_path), sample_ids(64, 12, seed=3)
    layers = smoothed(case)
    assert all((layer.keys is None) == (layout in UNTOUCHED) for layer in layers)
    source = run(case.model, ids, (float_layer(case.model, layer.index) for layer in layers), torch.float64)
    assert relative_error(source, run(case.model, ids, iter(layers), torch.float64)) < 1e-6
    for layer, plain in zip(layers, smoothed(case, replace(FOR_CACHE, cache="none")), strict=True):
        changed = {role for role in case.model.roles if not layer.weight(role).equal(plain.weight(role))}
        changed |= {role for role, norm in layer.norms.items() if not norm.weight.equal(plain.norms[role].weight)}
        assert changed == ({"query", "key"} if layout in NORMED else set() if layout in UNTOUCHED else {"q", "k"})


@pytest.mark.parametrize("layout", [*LINEAR, *NORMED])
def test_every_pair_reaches_equally_far(layout: str, tmp_path: Path) -> None:
    """All pairs may use the whole range of the cache, or all but a power of two's rounding; before, some few steps."""
    case = Case(layout, tmp_path)
    for layer in smoothed(case):
        assert layer.keys is not None
        assert layer.cache_scales is not None
        reach = kv_cache.key_reach(case.model.geometry, layer.index, layer.norms, layer.output_absmax)
        assert reach is not None
        shares = reach[reach > 0] / (layer.cache_scales[0] * QMAX)
        assert shares.max() <= 1.0001
        assert shares.min() > (0.49 if layout in NORMED else 0.999)
        assert layer.keys.log().mean().abs() < (0.5 if layout in NORMED else 1e-4)  # q grows no more than k does


def test_a_channel_that_never_moved_and_one_far_out(tmp_path: Path) -> None:
    """The first is left alone; the second is divided by no more than float16 holds."""
    geometry = Case("llama", tmp_path).model.geometry
    reach = torch.ones(geometry.kv_size)
    reach[0] = reach[geometry.head_dim // 2] = 0
    reach[1] = 1e9
    bounds = kv_cache.key_reach(geometry, 0, {}, {"k": reach})
    assert bounds is not None
    divisor = kv_cache.key_divisor({}, bounds)
    assert divisor is not None
    assert divisor[0] == 1
    assert divisor[1] == divisor[1 + geometry.head_dim // 2] == kv_cache.FURTHEST
    unused = kv_cache.key_divisor({}, torch.zeros(geometry.kv_size))
    assert unused is not None
    assert unused.equal(torch.ones(geometry.kv_size))


@given(seed=st.integers(0, 10_000), spike=st.floats(1, 1000))
def test_errors_of_values_that_saturate(seed: int, spike: float) -> None:
    """By numpy, in float64; nobody gains by clipping numbers of one size, everybody by clipping one that stands out."""
    values = torch.randn((40, 8), generator=torch.Generator().manual_seed(seed))
    values[0, 0] = spike
    scale = values.abs().amax() / QMAX
    found = kv_cache.clipping_errors(values, scale)
    exact = values.double().numpy()
    for share, error in found.items():
        step = float(scale * share)
        stored = numpy.clip(numpy.round(exact / step), -128, 127) * step
        assert error == pytest.approx(((stored - exact) ** 2).sum() / (exact**2).sum(), rel=0.02, abs=1e-9)
    alike = kv_cache.clipping_errors(values.sign() * 3, torch.tensor(3 / QMAX))
    assert min(alike, key=lambda share: alike[share]) == 1
    assert set(kv_cache.clipping_errors(torch.empty(0, 8), scale).values()) == {0}


@pytest.mark.parametrize("groups", ["paper", "none"])
def test_groups_that_leave_keys(groups: str, tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    assert all(layer.keys is None for layer in smoothed(case, SmoothingSettings(0.6, groups, cache="own")))


@pytest.mark.parametrize("layout", ["qwen2", "qwen3", "llama"])
def test_transformers_computes_the_same(layout: str, tmp_path: Path) -> None:
    """Somebody else's program: the smoothed model as a float checkpoint, with keys divided, in transformers."""
    case, ids = Case(layout, tmp_path), sample_ids(32, 10, seed=5)
    export(replace(case.source, settings=FOR_CACHE), [SmoothedWriter(tmp_path / "smoothed")])
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(ids).logits
        for folder in (tmp_path / "smoothed", case.folder)
    )
    assert relative_error(ours, theirs) < 1e-5
    keys = "model.layers.0.self_attn." + ("k_norm.weight" if layout in NORMED else "k_proj.weight")
    assert not open_model(tmp_path / "smoothed").read(keys).equal(case.model.read(keys))
