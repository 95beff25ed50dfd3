"""Searches on tiny models, and the distance of what they make from the float model, by means that are not theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from act_scales.search import Wanted, search
from act_scales.store import load_act_scales
from act_scales.text import Text
from smoothquant.plan import Plan
from smoothquant.scheme import Scheme, scheme_of
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.families.case import Case, run
from tests.models import sample_ids

TEXT = Text(tuple(sample_ids(12, 32)), "sample")
APART = torch.stack(TEXT.sequences[-3:])  # a quarter: the sequences that judge
SETTINGS = SmoothingSettings(0.8)


@dataclass(frozen=True)
class Searched:
    """A layout and the plan that a search has made for it."""

    case: Case
    plan: Plan


def searched(root: Path, name: str, act: str = "per-token", kv: str = "float", **wanted: Any) -> Searched:
    """A layout of the zoo in a new folder, with its plan. wanted: fields of `Wanted`."""
    case = Case(name, root)
    plan = search(case.model, TEXT, root / "plan", Wanted(scheme_of(act, kv_cache=kv), SETTINGS, **wanted))
    return Searched(case, plan.for_model(case.model))


def searches(root: pytest.TempPathFactory) -> Callable[..., Searched]:
    """`searched` by its words, each once. Each has a budget of 30 %."""
    return cache(lambda *words: searched(root.mktemp("-".join(words)), *words, budget=0.3))


def kl_of(wanted: Tensor, made: Tensor) -> float:
    """The mean of KL(wanted || made), of logits (batch, tokens, vocabulary), in float64."""
    true, other = wanted.double().log_softmax(-1), made.double().log_softmax(-1)
    return (true.exp() * (true - other)).sum(-1).mean().item()


def planned_logits(found: Searched, scheme: Scheme) -> Tensor:
    """Of `APART`, by the plan's layers in the arithmetic of a scheme."""
    plan, model = found.plan, found.case.model
    scales = load_act_scales(plan.act_scales)
    layers = []
    for layer in smoothed_layers(
        model, scales.input_absmax, plan.facts.smoothing, output_absmax=scales.output_absmax, plan=plan
    ):
        quantized = quantize_layer(layer, scheme).runnable(scheme.activations)
        cached = layer.cache_scales if scheme.kv_cache.quantized else None
        layers.append(replace(quantized, cache_scales=cached))
    return run(model, APART, iter(layers))
