"""A layer without its matrix products: it takes the time of all else, whatever the size of the matrices.

Attention, norms, activations, what listeners take of every input and output: all of it runs in the sweep that
calibration runs, on random numbers of the model's own shapes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.estimate.sizes import ModelSizes, Tokens
from smoothquant.layers import FloatLayer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.sweep import FLOAT, Sweep


@dataclass(frozen=True)
class HollowLayer(FloatLayer):
    """A layer whose linears hand out the first rows of `weights`, (tokens, out) by role, instead of products."""

    def to(self, device: str, dtype: torch.dtype | None = None) -> FloatLayer:
        return self

    def linear(self, role: str, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        y = self.weights[role][:rows].view(*x.shape[:-1], -1)
        if self.listen:
            self.listen(role, x, y)
        return y


def seconds_beside_products(
    sizes: ModelSizes, text: Tokens, dtype: torch.dtype, listeners: Sequence[Listener] = ()
) -> float:
    """The seconds that one layer takes for one token, its matrix products apart. text: how long sequences are."""
    model, count = sizes.model, text.batch // text.length
    ids = tuple(torch.zeros(text.length, dtype=torch.int64) for _ in range(count))
    sweep = Sweep(model, ids, listeners, dtype=dtype)
    layer = _hollow(model, sizes, text.batch, dtype)
    taken = []
    for _ in range(2):  # the first time, memory is new
        sweep.hidden.before(0, FLOAT).normal_()
        begin = time.perf_counter()
        sweep.layer(layer)
        taken.append(time.perf_counter() - begin)
    return min(taken) / text.batch


def _hollow(model: Model, sizes: ModelSizes, tokens: int, dtype: torch.dtype) -> HollowLayer:
    generator = torch.Generator().manual_seed(0)
    outputs: dict[int, Tensor] = {}  # by width
    for out, _ in sizes.shapes.values():
        if out not in outputs:
            outputs[out] = torch.randn(tokens, out, generator=generator).to(dtype)
    kind, shapes = model.family.norm, model.expected()
    norms = {}
    for role in model.family.norms:
        ones = torch.ones(shapes[f"{model.norm(0, role)}.weight"], dtype=model.checkpoint.dtype)
        norms[role] = Norm(kind, ones, torch.zeros_like(ones) if kind == "layer" else None)
    return HollowLayer(0, {role: outputs[out] for role, (out, _) in sizes.shapes.items()}, {}, norms)
