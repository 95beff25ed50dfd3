"""What float16 holds of a model: nothing beyond 65504, where an engine gives infinities and then NaN.

    a layer      the residual stream, as the layer reads it and after each branch was added; the branches, as their
                 matrices give them, normed, and the sum of two
    a linear     its input, smoothed, and its output, whose rows smoothing may have divided
    the head     what it reads, and its logits, before they are multiplied or capped

Folding leaves the residual stream and the branches as they are: no smoothing makes them smaller. Scores are not looked
at: graphs scale queries before the product, and most kernels sum it in float32. Where neither is so, as in the eager
attention of transformers, Qwen2-7B gives NaN in float16, and in no other kernel (huggingface/transformers#33317).

What reaches furthest are a few channels of a few tokens, on any text alike: SmolLM2-135M's reach 27,914 on one text and
27,047 on another, on an eighth of the first 27,339. A quarter of the range is a margin many times as wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from smoothquant import decoder
from smoothquant.errors import UserError
from smoothquant.fold import SmoothedLayer
from smoothquant.layers import ROW_PARALLEL, FloatLayer, Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.roles import parsed
from smoothquant.sweep import Sweep
from smoothquant.team import Team

LARGEST = torch.finfo(torch.float16).max
MARGIN = 1.25  # how many times as far other text than the calibration's may reach


class HeldMaxima(Listener):
    """Maxima of what an engine holds between its matrices. found: module name of a layer -> float32 (1,)."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.found = {name: torch.zeros(1) for name in layers(model)}

    def enter(self, source: FloatLayer) -> Mapping[str, Layer]:
        self._name, self._largest = self.model.family.layer.format(source.index), torch.zeros(1)
        return {}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        if parsed(role).kind in ROW_PARALLEL:
            self.residual(y)

    def residual(self, x: Tensor) -> None:
        self._largest = torch.maximum(self._largest.to(x.device), _largest(x))

    def merge(self, team: Team) -> None:
        self._largest = team.largest({self._name: self._largest})[self._name]

    def leave(self) -> None:
        self.found[self._name].copy_(self._largest)

    def state(self) -> dict[str, Tensor]:
        return self.found

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, values in self.found.items():
            values.copy_(state.pop(name))

    def with_head(self, end: Sweep) -> dict[str, Tensor]:
        """What was found, and the head's. end: of the sweep."""
        return self.found | {self.model.family.lm_head: head_absmax(end)}


@torch.no_grad()
def head_absmax(end: Sweep) -> Tensor:
    """How far what the head reads and its logits reach, float32 (1,). end: of a sweep over all layers.

    The longest input times the longest row is a bound on the logits, and as a rule far within float16. Only where it is
    not they are computed, which for a small model takes as long as some of its layers.
    """
    model = end.model
    reach, length, row = torch.zeros(3)
    for states in end.outputs():
        x = decoder.head_input(model, states.to(end.device)).float().cpu()
        end.hidden.release()
        reach, length = torch.maximum(reach, _largest(x)), torch.maximum(length, x.norm(dim=-1).amax())
    reach, length = end.team.largest({"": torch.stack((reach, length))})[""]
    for rows in model.rows(model.lm_head):
        row = torch.maximum(row, rows.float().norm(dim=-1).amax())
    if length * row <= LARGEST / MARGIN:
        return torch.maximum(reach, length * row)[None]
    for states in end.outputs():
        x = decoder.head_input(model, states.to(end.device))
        end.hidden.release()
        for rows in model.rows(model.lm_head):
            reach = torch.maximum(reach, _largest(torch.nn.functional.linear(x, rows.to(x.device, x.dtype))).cpu())
    return end.team.largest({"": reach[None]})[""]


def layers(model: Model) -> tuple[str, ...]:
    """Module names of the layers."""
    return tuple(model.family.layer.format(index) for index in range(model.geometry.layers))


def beyond(model: Model, held_absmax: Mapping[str, Tensor], margin: float = 1) -> str:
    """Where float16 holds a model no more and how far that reaches, in words; empty where it holds all of it.

    held_absmax: what `HeldMaxima` found, or a part of it. margin: how many times as far everything may reach.
    """
    for name, reach in held_absmax.items():
        if reach > LARGEST / margin:
            what = "what goes into or out of" if name == model.family.lm_head else "the residual stream of"
            return f"{what} {name} reaches {reach.item():.3g}"
    return ""


def check_held(model: Model, held_absmax: Mapping[str, Tensor], where: str, do: str) -> None:
    """Raise UserError unless float16 holds the residual stream and the head. where: what is made; do: the way out."""
    fault = beyond(model, held_absmax, MARGIN)
    if fault:
        raise _refused(where, fault, do)


def check_layer(layer: SmoothedLayer, where: str, do: str) -> None:
    """Raise UserError unless float16 holds all inputs and outputs of a smoothed layer's linears that are known."""
    for role, side, reach in _inner(layer):
        if reach.amax() > LARGEST / MARGIN:
            name = layer.model.linear(layer.index, role)
            raise _refused(where, f"the {side} of {name} reaches {reach.amax().item():.3g}, smoothed", do)


def _inner(layer: SmoothedLayer) -> Iterator[tuple[str, str, Tensor]]:
    """Role, side and maxima (channels,) of what flows into linears and out of them."""
    for role, reach in layer.input_absmax.items():
        yield role, "input", torch.maximum(reach, reach * layer.smoother[role]) if role in layer.smoother else reach
    for role, reach in layer.output_absmax.items():
        yield role, "output", reach


def _refused(where: str, fault: str, do: str) -> UserError:
    return UserError(
        f"{where}: float16 cannot hold this model: {fault}",
        expected=f"at most {LARGEST / MARGIN:.0f}: other text may reach further, and float16 ends at {LARGEST:.0f}",
        do=do,
    )


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude, float32 scalar; NaN shows."""
    low, high = x.aminmax()
    return torch.maximum(high, -low).float()
