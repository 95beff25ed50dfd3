"""Input maxima of linears by the plainest means: hooks on transformers' modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothquant.model import Model


@torch.no_grad()
def hooked_absmax(transformers: torch.nn.Module, model: Model, ids: Tensor) -> dict[str, Tensor]:
    """By the module names of `model`, for the linears that get quantized. ids: (batch, tokens)."""
    found: dict[str, Tensor] = {}
    wanted = {name for name, _ in model.linears()}
    handles = []

    def take(name: str, x: Tensor) -> None:
        if name in wanted and x.numel():
            values = x.abs().flatten(0, -2).amax(dim=0)
            found[name] = torch.maximum(values, found.get(name, values))

    def linear(name: str) -> Callable:
        return lambda module, inputs: take(name, inputs[0])

    def experts(layer: int) -> Callable:
        return lambda module, inputs: _experts(lambda role: model.linear(layer, role), module, *inputs, take)

    for name, module in transformers.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(linear(name)))
        elif name.endswith("mlp.experts"):  # of all experts, in one tensor each
            handles.append(module.register_forward_pre_hook(experts(int(name.split(".")[2]))))
    transformers(ids)
    for handle in handles:
        handle.remove()
    return found


def _experts(name: Callable, module: Any, x: Tensor, chosen: Tensor, shares: Tensor, take: Callable) -> None:
    for expert in range(len(module.gate_up_proj)):
        rows = x[(chosen == expert).any(dim=-1)]
        gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        take(name(f"gate.{expert}"), rows)
        take(name(f"up.{expert}"), rows)
        take(name(f"down.{expert}"), torch.nn.functional.silu(gate) * up)


@torch.no_grad()
def hooked_streams(transformers: torch.nn.Module, model: Model, ids: Tensor) -> dict[str, float]:
    """How far the residual stream reaches before and after each layer, by the layers' module names. ids: (batch,
    tokens)."""
    found: dict[str, float] = {}

    def take(name: str) -> Callable:
        def hook(module: Any, inputs: tuple, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            found[name] = max(inputs[0].abs().max().item(), after.abs().max().item())

        return hook

    names = [model.family.layer.format(layer) for layer in range(model.geometry.layers)]
    handles = [transformers.get_submodule(name).register_forward_hook(take(name)) for name in names]
    transformers(ids)
    for handle in handles:
        handle.remove()
    return found
