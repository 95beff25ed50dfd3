"""Plans as a search would write them, with weights that are rounded at random: no other way could find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from act_scales.store import ActScales
from smoothquant.artifacts.plan import ACT_SCALES, PLAN, STEP, GroupChoice, LinearChoice, Outcome, PlanFacts
from smoothquant.artifacts.record import as_json
from smoothquant.artifacts.safetensors_files import save_tensors
from smoothquant.choose import choose_scales
from smoothquant.files import write_json
from smoothquant.fold import Rounded, Scales, SmoothedLayer, fold
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.plan import PlannedLayer, layer_file
from smoothquant.quantization import QMAX, quantize_weight
from smoothquant.ranges import input_ranges, output_ranges
from smoothquant.scheme import WEIGHTS, Scheme, scheme_of
from smoothquant.settings import SmoothingSettings
from smoothquant.workspace import Workspace


def write_plan(
    model: Model,
    act_scales: ActScales,
    out: Path,
    scheme: Scheme | None = None,
    settings: SmoothingSettings = SmoothingSettings(0.6),  # noqa: B008 (frozen)
    seed: int = 0,
    **changes: object,
) -> Path:
    """The folder of a plan. scheme: per token by default. changes: to its record."""
    scheme, facts = scheme or scheme_of("per-token"), []
    generator = torch.Generator().manual_seed(seed)
    with Workspace(out, STEP, {"seed": seed}) as work:
        for index in range(model.geometry.layers):
            planned = _layer(model, act_scales, index, scheme, settings, generator)
            save_tensors(work.path(layer_file(index)), planned.tensors(model, index))
            facts += [model.linear(index, role) for role in planned.rounded]
        record = PlanFacts(
            model=model.checkpoint.fingerprint,
            family=model.family.name,
            smoothing=settings,
            scheme=scheme,
            text="text",
            tokens=1024,
            apart=256,
            trial=512,
            groups=(GroupChoice(0, tuple(facts[:1]), "norm", {"none": 0.2, "0.6": 0.1}, "0.6"),),
            linears=tuple(LinearChoice(name, 1, "error feedback", {"nearest": 0.2}, 0.1) for name in dict.fromkeys(facts)),
            candidates=(Outcome("0.6", 0.0, 0.01, 1.01, 0.9),),
            chosen="0.6",
            curve=(Outcome("0.6", 0.0, 0.01, 1.01, 0.9),),
            max_positions=model.choices.get("max_positions"),
        )
        act_scales.save(work.path(ACT_SCALES))
        write_json(work.path(PLAN), as_json(replace(record, **changes)))
        work.commit()
    return out


def rewrite_layer(folder: Path, index: int, changes: Mapping[str, Tensor | None]) -> None:
    """Change the tensors of a layer's file, and let the manifest agree with it. changes: None for those to drop."""
    from safetensors.torch import load_file, save_file

    from tests.outputs import agree

    tensors = {**load_file(folder / layer_file(index)), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / layer_file(index))
    agree(folder)


def _layer(
    model: Model,
    act_scales: ActScales,
    index: int,
    scheme: Scheme,
    settings: SmoothingSettings,
    generator: torch.Generator,
) -> PlannedLayer:
    """A layer whose second half of groups is not smoothed, and whose linears are rounded at random."""
    source = float_layer(model, index)
    act = input_ranges(model, index, act_scales.input_absmax)
    output = output_ranges(model, index, act_scales.output_absmax)
    chosen = choose_scales(model, index, source, act, output, settings)
    column, absmax = dict(chosen.column), dict(chosen.input_absmax)
    if index % 2:  # the choice "none"
        for role in model.groups[-1].linears:
            absmax[role] = act[role]
            column.pop(role, None)
    scales = Scales(column, absmax)
    layer = fold(model, index, source, settings, scales)
    kept = scheme.float_linears
    roles = [role for role in model.quantized_roles if model.linear(index, role) not in kept]
    return PlannedLayer(scales, {role: _rounded(layer, role, generator) for role in roles})


def _rounded(layer: SmoothedLayer, role: str, generator: torch.Generator) -> Rounded:
    nearest, scale = quantize_weight(layer.weight(role), WEIGHTS["per-channel"])
    change = torch.randint(-1, 2, nearest.shape, generator=generator)
    weight = (nearest + change).clamp(-QMAX, QMAX).to(torch.int8)
    bias = layer.bias(role)
    if bias is not None:
        bias = bias + 0.05 * torch.randn(bias.shape, generator=generator)
    return Rounded(weight, scale * (0.9 + 0.2 * torch.rand(scale.shape, generator=generator)), bias)
