"""Plans as a search would write them, with weights that are rounded at random: nothing else would round them so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from act_scales.store import ActScales
from exporters.export import Source
from recipes.pipeline import source_by_plan
from smoothquant.artifacts.plan import (
    ACT_SCALES,
    HEAD,
    PLAN,
    STEP,
    GroupChoice,
    HeadChoice,
    LinearChoice,
    PlanFacts,
    PlanOutcome,
)
from smoothquant.artifacts.record import as_json
from smoothquant.artifacts.safetensors_files import save_tensors
from smoothquant.choose import choose_scales
from smoothquant.files import write_json
from smoothquant.fold import Rounded, Scales, SmoothedLayer, fold
from smoothquant.head import PlannedHead, is_smoothable
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.plan import Plan, PlannedLayer, layer_file, read_plan
from smoothquant.quantization import QMAX, quantize_weight
from smoothquant.ranges import input_ranges, output_ranges
from smoothquant.scheme import PER_TOKEN, WEIGHTS, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.workspace import Workspace
from tests.families.case import Case
from tests.outputs import agree

SETTINGS = SmoothingSettings(0.6)
HEAD_CHOICE = HeadChoice(
    tried={"none": {"nearest": 0.02, "error feedback": 0.015}, "0.5": {"nearest": 0.004, "error feedback": 0.003}},
    scale="0.5",
    rounding="error feedback",
    in_float=PlanOutcome("0.6", share=0.0, kl=0.007, perplexity_ratio=1.01, top1=0.9),
    in_int8=PlanOutcome("0.6", share=0.0, kl=0.009, perplexity_ratio=1.02, top1=0.9),
)
LAYOUTS = ("llama", "qwen2", "opt", "bloom", "falcon-40b", "phi3", "mixtral", "gemma3", "olmo2")


def write_plan(
    model: Model,
    act_scales: ActScales,
    out: Path,
    scheme: Scheme = PER_TOKEN,
    settings: SmoothingSettings = SETTINGS,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """The folder of a plan. seed: of its rounding. changes: to its record."""
    outcome = PlanOutcome("0.6", share=0.0, kl=0.01, perplexity_ratio=1.01, top1=0.9)
    names = [name for name, _ in model.linears()]
    facts = PlanFacts(
        model=model.checkpoint.fingerprint,
        family=model.family.name,
        smoothing=settings,
        scheme=scheme,
        text="text",
        tokens=1024,
        apart=256,
        trial=512,
        width=64,
        groups=(GroupChoice(0, tuple(names[:1]), "norm", {"none": 0.2, "0.6": 0.1}, "0.6"),),
        linears=tuple(LinearChoice(name, 64, "error feedback", {"nearest": 0.2}, 0.1) for name in names),
        candidates=(outcome,),
        chosen=outcome.name,
        curve=(outcome,),
        max_positions=model.choices.get("max_positions"),
        head=HEAD_CHOICE if scheme.head.quantized else None,
    )
    generator = torch.Generator().manual_seed(seed)
    with Workspace(out, STEP, {"seed": seed}) as work:
        for index in range(model.geometry.layers):
            planned = _layer(model, act_scales, index, scheme, settings, generator)
            save_tensors(work.path(layer_file(index)), planned.tensors(model, index))
        if scheme.head.quantized:
            save_tensors(work.path(HEAD), planned_head(model, generator).tensors(model))
        act_scales.save(work.path(ACT_SCALES))
        write_json(work.path(PLAN), as_json(replace(facts, **changes)))
        work.commit()
    return out


def planned_head(model: Model, random: torch.Generator) -> PlannedHead:
    """A head whose scale is random, where its input can be smoothed, and so is its rounding."""
    scale = None
    if is_smoothable(model):
        norm = model.norm_at(str(model.family.final_norm))
        scale, _ = norm.fold((torch.rand(model.geometry.hidden_size, generator=random) * 2 - 1).exp())
    weight = torch.cat(list(PlannedHead(scale).smoothed_rows(model)))
    return PlannedHead(scale, _changed(weight, random))


def source_with_plan(case: Case, scheme: Scheme = PER_TOKEN) -> Source:
    """A layout of the zoo, with a plan for it beside it."""
    folder = write_plan(case.model, case.act_scales, case.root / "plan", scheme)
    return source_by_plan(case.model, read_plan(folder).for_model(case.model))


def makers(root: pytest.TempPathFactory) -> Callable[[str], Source]:
    """`source_with_plan` by a layout's name, each once."""
    return cache(lambda name: source_with_plan(Case(name, root.mktemp(name))))


def plan_of(source: Source) -> Plan:
    """The plan of a source that has one."""
    assert source.plan is not None
    return source.plan


def tensors_of(folder: Path, index: int) -> dict[str, Tensor]:
    """The tensors of a layer's file."""
    return load_file(folder / layer_file(index))


def change_layer(folder: Path, index: int, changes: Mapping[str, Tensor | None]) -> None:
    """Change tensors of a layer's file, and let the manifest agree with it. changes: None for those to drop."""
    tensors = {**tensors_of(folder, index), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / layer_file(index))
    agree(folder)


def _layer(
    model: Model,
    act_scales: ActScales,
    index: int,
    scheme: Scheme,
    settings: SmoothingSettings,
    random: torch.Generator,
) -> PlannedLayer:
    """A layer whose linears are rounded at random. In odd ones the last group is not smoothed."""
    source = float_layer(model, index)
    act = input_ranges(model, index, act_scales.input_absmax)
    chosen = choose_scales(model, index, source, act, output_ranges(model, index, act_scales.output_absmax), settings)
    column, absmax = dict(chosen.column), dict(chosen.input_absmax)
    for role in model.groups[-1].linears if index % 2 and model.groups else ():
        absmax[role] = act[role]
        column.pop(role, None)
    scales = Scales(column, absmax)
    layer, kept = fold(model, index, source, settings, scales), scheme.float_linears
    roles = [role for role in model.quantized_roles if model.linear(index, role) not in kept]
    return PlannedLayer(scales, {role: _rounded(layer, role, random) for role in roles})


def _rounded(layer: SmoothedLayer, role: str, random: torch.Generator) -> Rounded:
    found = _changed(layer.weight(role), random)
    bias = layer.bias(role)
    if bias is not None:
        bias = bias + 0.05 * torch.randn(bias.shape, generator=random)
    return replace(found, bias=bias)


def _changed(weight: Tensor, random: torch.Generator) -> Rounded:
    """A weight rounded to nearest, and a step beside it at random, with scales that are near to its own."""
    nearest, scale = quantize_weight(weight, WEIGHTS["per-channel"])
    change = torch.randint(-1, 2, nearest.shape, generator=random)
    rounded = (nearest + change).clamp(-QMAX, QMAX).to(torch.int8)
    return Rounded(rounded, scale * (0.9 + 0.2 * torch.rand(scale.shape, generator=random)))
