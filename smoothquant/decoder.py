"""The decoder that a family record describes, in PyTorch, one layer at a time.

The record is executed here alone: calibration listens to the linears, the contract compares two runs, validation runs
it in float and in W8A8. The caller decides how a linear computes: its `Layer` supplies `linear(role, x)` and the norms.
The decoder supplies the operations between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from smoothquant.activations import ACTIVATIONS
from smoothquant.attention import Pattern, Patterns, attend, capped, rotate
from smoothquant.family import Geometry
from smoothquant.layers import Layer
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.roles import ROUTER


def embed(
    model: Model,
    ids: Tensor,
    dtype: torch.dtype,
    positions: Tensor | None = None,
    rows: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The input of the first layer, (batch, tokens, hidden) in `dtype`.

    ids: int64 (batch, tokens). positions: int64 (batch, tokens); by default 0, 1, ... in every sequence. rows: gives
    the rows of the embedding for ids, (..., embedded size); the stored ones by default.
    """
    family, geometry = model.family, model.geometry
    found = model.lookup(f"{family.embedding}.weight", ids) if rows is None else rows(ids)
    hidden = _scaled(found.to(dtype), geometry.embedding_scale)
    if family.project_in:
        hidden = functional.linear(hidden, model.read(f"{family.project_in}.weight").to(dtype))
    if family.positions:
        positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
        hidden = hidden + model.lookup(f"{family.positions}.weight", positions + family.position_offset).to(dtype)
    if family.embedding_norm:
        hidden = model.norm_at(family.embedding_norm)(hidden, geometry.norm_epsilon)
    return hidden


def forward(
    model: Model,
    layer: Layer,
    hidden: Tensor,
    patterns: Patterns,
    hear: Callable[[Tensor], None] = lambda residual: None,
) -> Tensor:
    """One decoder layer over whole sequences, causal. hidden: (batch, tokens, hidden) float; returns the same shape.

    patterns: of so many tokens (`attention.patterns`). hear: is given the residual stream, as it is read and whenever
    something has been added to it, and what is added.
    """
    hear(hidden)
    scale = model.geometry.residual_scale
    x = _normed(model, layer, "attention", hidden)
    branch = _normed(model, layer, "attention_output", _attention(model, layer, x, patterns[layer.index]))
    if model.family.parallel:
        x = _normed(model, layer, "mlp", hidden) if "mlp" in layer.norms else x
        other = _normed(model, layer, "mlp_output", _mlp(model, layer, x))
        hidden = hidden + _scaled(branch, scale) + _scaled(other, scale)
        for held in (branch, other, branch + other, hidden):
            hear(held)
        return hidden
    hear(branch)
    hidden = hidden + _scaled(branch, scale)
    hear(hidden)
    hidden = _normed(model, layer, "attention_residual", hidden)
    branch = _normed(model, layer, "mlp_output", _mlp(model, layer, _normed(model, layer, "mlp", hidden)))
    hear(branch)
    hidden = hidden + _scaled(branch, scale)
    hear(hidden)
    return _normed(model, layer, "mlp_residual", hidden)


def head_input(model: Model, hidden: Tensor, norm: Norm | None = None) -> Tensor:
    """The input of lm_head, (..., embedded size), in the dtype of `hidden`. hidden: the hidden states after the last
    layer, (..., hidden). norm: in place of the model's final norm, if one is given."""
    family, device = model.family, str(hidden.device)
    if family.final_norm:
        norm = norm or model.norm_at(family.final_norm)
        hidden = norm.to(device)(hidden, model.geometry.norm_epsilon)
    if family.project_out:
        weight = model.read(f"{family.project_out}.weight").to(hidden.device, hidden.dtype)
        hidden = functional.linear(hidden, weight)
    return hidden


def logits(model: Model, hidden: Tensor) -> Tensor:
    """The logits after final norm and lm_head, (batch, tokens, vocab), in the dtype of `hidden`.

    hidden: the hidden states after the last layer, (batch, tokens, hidden).
    """
    x = head_input(model, hidden)
    parts = [functional.linear(x, rows.to(x.device, x.dtype)) for rows in model.rows(model.lm_head)]
    return finished(model, torch.cat(parts, dim=-1))


def finished(model: Model, products: Tensor) -> Tensor:
    """The logits, (..., vocab), from the products of the head's rows with its input, (..., vocab)."""
    return capped(_scaled(products, model.geometry.logits_scale), model.geometry.logits_softcap)


def route(geometry: Geometry, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of every token, int64 (tokens, experts per token), and the factors of their outputs, in the same
    shape and the dtype of the scores.

    scores: the output of the router, (tokens, experts).
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    shares, chosen = wide.softmax(dim=-1).topk(geometry.experts_per_token, dim=-1)
    if geometry.normalized_shares:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return chosen, shares.to(scores.dtype)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _normed(model: Model, layer: Layer, role: str, x: Tensor) -> Tensor:
    """The output of the norm with this role, or x itself if the layer has none."""
    return layer.norms[role](x, model.geometry.norm_epsilon) if role in layer.norms else x


def _attention(model: Model, layer: Layer, x: Tensor, pattern: Pattern) -> Tensor:
    geometry = model.geometry
    batch, tokens, _ = x.shape
    q, k, v = (layer.linear(role, x) for role in ("q", "k", "v"))
    q, k = _normed(model, layer, "queries", q), _normed(model, layer, "keys", k)
    q, k, v = (y.view(batch, tokens, -1, geometry.head_dim).transpose(1, 2) for y in (q, k, v))
    # (batch, heads, tokens, head_dim)
    q, k = _normed(model, layer, "query", q), _normed(model, layer, "key", k)
    if pattern.rotary:
        q, k = rotate(q, *pattern.rotary), rotate(k, *pattern.rotary)
    k, v = layer.cached(k, v)
    y = attend(geometry, q, k, v, pattern.bias)
    return layer.linear("o", y.transpose(1, 2).reshape(batch, tokens, geometry.query_size))


def _mlp(model: Model, layer: Layer, x: Tensor) -> Tensor:
    if ROUTER not in model.family.linears:
        return _dense(model, layer, x)
    flat = x.flatten(0, -2)
    chosen, shares = route(model.geometry, layer.linear(ROUTER, flat))
    y = torch.zeros_like(flat)
    for expert in range(model.geometry.experts):
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            y.index_add_(0, rows, _dense(model, layer, flat[rows], f".{expert}") * shares[rows, place, None])
    return y.view_as(x)


def _dense(model: Model, layer: Layer, x: Tensor, expert: str = "") -> Tensor:
    """The output of a dense MLP, or of one expert. expert: the end of the expert's roles, such as ".3"."""
    activation = ACTIVATIONS[model.geometry.activation]
    if model.family.gated:
        return layer.linear(
            f"down{expert}", activation(layer.linear(f"gate{expert}", x)) * layer.linear(f"up{expert}", x)
        )
    return layer.linear(f"down{expert}", activation(layer.linear(f"up{expert}", x)))
