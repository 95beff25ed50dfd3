"""Find the sources of the error: run the W8A8 form of every layer beside the float layer.

    SQNR of a linear     10 log10( sum |y|^2 / sum |y' - y|^2 )  in dB. y is the smoothed float output, y' the W8A8
                         output for the same float input. So errors of earlier linears do not count.
    share of weights     the rounding of a weight to steps s is uniform, s^2 / 12, and independent of the input x: it
                         adds sum |x|^2 * sum over rows of s^2 / 12 to sum |y' - y|^2 (somewhat less in rows whose
                         weights are mostly below s / 2). All else comes from activations.
    error of the hidden  sqrt( mean over tokens of |h' - h|^2 / |h|^2 ). h' are the hidden states of the W8A8 layers,
                         with all errors so far. Each token counts the same: otherwise the few tokens with huge hidden
                         states would hide all others.

They are taken from the first `TOKENS` tokens, in whole batches: more would tell the same. An engine that is this form,
and a pass for exactness, go through all tokens.

The power of a batch is the square of a float32 norm. Batches are summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from builders.validate.scheme import EngineScheme
from smoothquant.embedding import embedding_of
from smoothquant.head import PlannedHead, head_logits
from smoothquant.layers import FloatLayer, Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.stream import SmoothedLayer
from smoothquant.sweep import FLOAT
from smoothquant.team import Team

TOKENS = 2048  # that tell the errors of linears and of the hidden states
NO_ERROR = 200.0  # dB, for no error at all; float32 resolves no more than 150 dB


@dataclass(frozen=True)
class LinearError:
    """The error of one linear. name: its module name in the checkpoint. sqnr: in dB; higher is better."""

    layer: int
    role: str
    name: str
    sqnr: float


class W8A8Stream(Listener):
    """A listener that runs the W8A8 layers of one scheme beside the float layers, in float32 and, if `exact`, also in
    float64.

    device: the device of the sweep. source: the model whose embedding and head the scheme has: the folder's own, where
    one is run as it is stored.
    """

    def __init__(self, model: Model, scheme: EngineScheme, exact: bool = False, device: str = "cpu") -> None:
        self.model, self.scheme, self.exact, self.device = model, scheme, exact, device
        self.source = scheme.folder.model if scheme.folder else model
        own = scheme.folder is not None or scheme.scheme.embedding.quantized
        self.embedding = embedding_of(self.source, scheme.scheme, self._head) if own else None
        self.tokens = None if exact or scheme.folder else TOKENS
        self.forms = {self.form(dtype): dtype for dtype in (torch.float32, torch.float64)[: 1 + exact]}
        self._sqnr = torch.full((model.geometry.layers, len(model.roles)), math.nan, dtype=torch.float64)
        self._weights = torch.full_like(self._sqnr, math.nan)  # by weights alone: sum |y' - y|^2 / sum |y|^2
        self._errors = torch.full((model.geometry.layers,), math.nan, dtype=torch.float64)

    def form(self, dtype: torch.dtype) -> str:
        """The name of the form that is computed in a dtype."""
        return f"w8a8.{self.scheme.key}.{str(dtype).removeprefix('torch.')}"

    @property
    def linears(self) -> tuple[LinearError, ...]:
        """The errors of all linears so far. Experts that no token reached have no error."""
        return tuple(
            LinearError(index, role, self.model.linear(index, role), found)
            for index, row in enumerate(self._sqnr.tolist())
            for role, found in zip(self.model.roles, row, strict=True)
            if not math.isnan(found)
        )

    @property
    def weight_share(self) -> float | None:
        """The share of rounded weights in the errors of all linears with a smoothed input so far; None if there are
        none."""
        smoothed = ~self._weights.isnan()
        noise = 10 ** (-self._sqnr[smoothed] / 10)
        return (self._weights[smoothed].minimum(noise).sum() / noise.sum()).item() if len(noise) else None

    @property
    def hidden_errors(self) -> tuple[float, ...]:
        """The errors of the hidden states after each layer so far."""
        return tuple(found for found in self._errors.tolist() if not math.isnan(found))

    def enter(self, source: FloatLayer) -> dict[str, Layer]:
        smoothed: SmoothedLayer = self.scheme.layer(self.model, source.index, source)
        quantized = self.scheme.runnable(smoothed)
        cache_scales = self.scheme.cache_scales(self.model, source.index)
        self._layer = replace(quantized, cache_scales=cache_scales, ranks=self.scheme.ranks).to(self.device)
        # the divisors of inputs that norms or linears before them hold; a linear with a smoother divides its own input
        divided = {role: scale for role, scale in smoothed.column.items() if role not in smoothed.smoother}
        self._column = {role: scale.to(self.device) for role, scale in divided.items()}
        self._row = {role: scale.to(self.device) for role, scale in smoothed.row.items()}
        self._powers: dict[str, Tensor] = {}  # by role
        self._squares, self._tokens = 0.0, 0.0
        return dict.fromkeys(self.forms, self._layer)

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        if role in self._layer.float_weights or self.scheme.unexplained:
            return
        smoothed = y / self._row[role] if role in self._row else y
        x = x / self._column[role] if role in self._column else x
        found, smoother = self._layer.linear(role, x), self._layer.smoothers.get(role)
        seen = x if smoother is None else x / smoother
        powers = torch.stack((_power(smoothed), _power(found.sub_(smoothed)), _power(seen)))
        self._powers[role] = self._powers.get(role, 0) + powers

    def advance(self, hidden: Mapping[str, Tensor]) -> None:
        reference, found = hidden[FLOAT], hidden[self.form(torch.float32)]
        error = (found - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)
        self._squares += error.double().square().sum().item()
        self._tokens += error.numel()

    def merge(self, team: Team) -> None:
        self._powers = team.total(self._powers)
        sums = torch.tensor([self._squares, self._tokens], dtype=torch.float64)
        self._squares, self._tokens = team.total({"": sums})[""].tolist()

    def leave(self) -> None:
        """Store the layer's errors."""
        index = self._layer.index
        for place, role in enumerate(self.model.roles):
            if role in self._powers:
                signal, noise, seen = self._powers.pop(role).tolist()
                steps = self._layer.weight_scales[role].double().square().sum().item()
                self._sqnr[index, place] = sqnr(signal, noise)
                if role in self._column or role in self._layer.smoothers:
                    self._weights[index, place] = seen * steps / 12 / max(signal, 1e-300)
        self._errors[index] = math.sqrt(self._squares / self._tokens)
        del self._layer, self._column, self._row

    @property
    def leftover(self) -> Collection[str]:
        return self._powers.keys()

    def state(self) -> dict[str, Tensor]:
        return {"sqnr": self._sqnr, "weights": self._weights, "hidden_errors": self._errors}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._sqnr, self._weights = state.pop("sqnr"), state.pop("weights")
        self._errors = state.pop("hidden_errors")

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of the scheme's head, (tokens, vocab), in the dtype of its input.

        hidden: the hidden states after the last layer, (tokens, hidden).
        """
        return head_logits(self.source, self.scheme.scheme, hidden.to(self.device), self._head)

    @cached_property
    def _head(self) -> PlannedHead:
        return self.scheme.head(self.model)


def sqnr(signal: Tensor | float, noise: Tensor | float) -> float:
    """The signal-to-quantization-noise ratio of two sums of squares, in dB, within +-200."""
    if noise <= 0:
        return NO_ERROR
    return min(max(10 * math.log10(max(float(signal), 1e-300) / float(noise)), -NO_ERROR), NO_ERROR)


def _power(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values).double().square()
