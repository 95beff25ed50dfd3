"""Where the error comes from: the W8A8 form of every layer, computed beside the float one.

    SQNR of a linear     10 log10( sum |y|^2 / sum |y' - y|^2 )  in dB: y the smoothed float output, y' the W8A8 output
                         for the same float input, so that each linear answers for itself alone
    error of the hidden  sqrt( mean over tokens of |h' - h|^2 / |h|^2 ): h' is what the W8A8 layers so far have made of
                         the text, all errors accumulated. Each token counts the same: the few tokens with huge hidden
                         states would otherwise hide all others.

A batch's power is a float32 norm, squared; batches are summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from builders.validate.scheme import EngineScheme
from smoothquant import decoder
from smoothquant.attention import Patterns, capped
from smoothquant.layers import FloatLayer, W8A8Layer
from smoothquant.model import Model
from smoothquant.quantization import quantize_weight, w8a8_linear
from smoothquant.stream import SmoothedLayer, quantize_layer

NO_ERROR = 200.0  # dB: what no error at all is shown as; float32 cannot tell more than 150 apart


@dataclass(frozen=True)
class LinearError:
    """name: the linear's module name in the checkpoint; sqnr: in dB, higher is better."""

    layer: int
    role: str
    name: str
    sqnr: float


class W8A8Stream:
    """A text on its way through the W8A8 layers of one scheme, in float32 and, if `exact`, in float64.

    Per layer, in this order: `enter`, then for every batch of sequences `compare` (by way of the float layer's
    listener) and `advance`, then `leave`. hidden: dtype -> hidden states (batch, tokens, hidden) of every batch.
    """

    def __init__(self, model: Model, scheme: EngineScheme, embedded: Sequence[Tensor], exact: bool) -> None:
        self.model, self.scheme = model, scheme
        dtypes = (torch.float32, torch.float64) if exact else (torch.float32,)
        self.hidden = {dtype: [batch.to(dtype) for batch in embedded] for dtype in dtypes}
        self.linears: list[LinearError] = []
        self.hidden_errors: list[float] = []

    def enter(self, index: int, source: FloatLayer) -> None:
        """Quantize a layer."""
        self._smoothed: SmoothedLayer = self.scheme.layer(self.model, index, source)
        kept = {
            role: self._smoothed.weight(role)
            for role in self.model.quantized_roles
            if self.model.linear(index, role) in self.scheme.float_linears
        }
        quantized = quantize_layer(self._smoothed, self.scheme.weights).runnable(self.scheme.activations, kept)
        cache_scales = self.scheme.cache_scales(self.model, index)
        self._layer: W8A8Layer = replace(quantized, cache_scales=cache_scales, ranks=self.scheme.ranks)
        self._powers: dict[str, Tensor] = {}  # by role; experts that no token reaches have none
        self._squares, self._tokens = 0.0, 0

    def compare(self, role: str, x: Tensor, y: Tensor) -> None:
        """x: (..., in), y: (..., out): input and output of a linear in the original float model."""
        if role in self._layer.float_weights:
            return
        column, row = self._smoothed.column.get(role), self._smoothed.row.get(role)
        if role in self._smoothed.smoother:
            column = None  # the layer divides its input itself
        smoothed = y if row is None else y / row
        found = self._layer.linear(role, x if column is None else x / column)
        powers = torch.stack((_power(smoothed), _power(found.sub_(smoothed))))
        self._powers[role] = self._powers.get(role, 0) + powers

    def advance(self, batch: int, reference: Tensor, patterns: Mapping[torch.dtype, Patterns]) -> None:
        """Take one batch through the layer. reference: (batch, tokens, hidden) that the float model makes of it;
        patterns: of so many tokens, for each dtype."""
        for dtype, hidden in self.hidden.items():
            hidden[batch] = decoder.forward(self.model, self._layer, hidden[batch], patterns[dtype])
        error = (self.hidden[torch.float32][batch] - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)
        self._squares += error.double().square().sum().item()
        self._tokens += error.numel()

    def leave(self) -> None:
        """Note the layer's errors."""
        index = self._smoothed.index
        for role, (signal, noise) in self._powers.items():
            self.linears.append(LinearError(index, role, self.model.linear(index, role), sqnr(signal, noise)))
        self.hidden_errors.append(math.sqrt(self._squares / self._tokens))
        del self._smoothed, self._layer

    @torch.no_grad()
    def logits(self, batch: int, row: int, dtype: torch.dtype) -> Tensor:
        """Logits (tokens, vocab) of one sequence after the last layer, in float32, or float64 of an exact stream."""
        model, hidden = self.model, self.hidden[dtype][batch][row : row + 1]
        if self.scheme.lm_head == "float":
            return decoder.logits(model, hidden)[0]
        x = decoder.head_input(model, hidden)
        parts = [w8a8_linear(x, *quantize_weight(rows)) for rows in model.rows(model.lm_head)]
        return capped(torch.cat(parts, dim=-1), model.geometry.logits_softcap)[0]


def sqnr(signal: Tensor | float, noise: Tensor | float) -> float:
    """Signal-to-quantization-noise ratio in dB of two sums of squares, within +-200."""
    if noise <= 0:
        return NO_ERROR
    return min(max(10 * math.log10(max(float(signal), 1e-300) / float(noise)), -NO_ERROR), NO_ERROR)


def _power(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values).double().square()
