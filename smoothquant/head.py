"""The output head in INT8: its weight per output channel, its input per token.

    logits  =  Q(norm(x) / s) Q(W s)^T          scaled and capped as the family has it

The scale s is a plan's. It divides the final norm and multiplies the columns of W, so that the function stays as it is.
Between a final norm and a head there may be a projection (`project_out`): then there is nothing to fold s into.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smoothquant import decoder
from smoothquant.artifacts.smoothing_file import SCALE
from smoothquant.fold import Rounded, fold_final_norm
from smoothquant.int8_checkpoint import WEIGHT, WEIGHT_SCALE
from smoothquant.model import ROWS, Model
from smoothquant.norms import Norm
from smoothquant.quantization import quantize_weight, w8a8_linear
from smoothquant.scheme import ACTIVATIONS, HEADS, Scheme

INPUT = ACTIVATIONS["per-token"]  # the precision of the input of a head in INT8


@dataclass(frozen=True)
class PlannedHead:
    """What a plan says of the output head. smoothing_scale: the divisor of its input, float32 (hidden,); None where
    nothing is folded. rounded: its smoothed weight, (vocab, hidden); None where it is rounded to nearest."""

    smoothing_scale: Tensor | None = None
    rounded: Rounded | None = None

    def norm(self, model: Model) -> Norm | None:
        """The final norm with the scale folded in; None where the model's own is as it is."""
        return None if self.smoothing_scale is None else fold_final_norm(model, self.smoothing_scale)

    def smoothed_rows(self, model: Model, device: str = "cpu") -> Iterator[Tensor]:
        """The smoothed weight, some rows at a time, float32 (rows, hidden). device: that of the scale."""
        for rows in model.rows(model.lm_head):
            yield self._smoothed(rows.to(device, torch.float32))

    def _smoothed(self, rows: Tensor) -> Tensor:
        return rows if self.smoothing_scale is None else rows * self.smoothing_scale

    def int8_rows(self, model: Model) -> Iterator[tuple[Tensor, Tensor]]:
        """The rounded weight, some rows at a time: int8 (rows, hidden), and its weight_scale, float32 (rows,)."""
        if self.rounded is not None:
            yield from zip(self.rounded.weight.split(ROWS), self.rounded.weight_scale.split(ROWS), strict=True)
            return
        for rows in self.smoothed_rows(model):
            yield quantize_weight(rows, HEADS["int8"])

    def int8_at(self, model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded rows of tokens: int8 (tokens, hidden), and their weight_scale, float32 (tokens,).
        ids: int64 (tokens,)."""
        if self.rounded is not None:
            return self.rounded.weight[ids], self.rounded.weight_scale[ids]
        return quantize_weight(self._smoothed(model.lookup(model.lm_head, ids).float()), HEADS["int8"])

    def tensors(self, model: Model) -> dict[str, Tensor]:
        """The tensors of its file in a plan, by name."""
        name, found = model.family.lm_head, {}
        if self.smoothing_scale is not None:
            found[name + SCALE] = self.smoothing_scale
        if self.rounded is not None:
            found |= {name + WEIGHT: self.rounded.weight, name + WEIGHT_SCALE: self.rounded.weight_scale}
        return found


UNPLANNED = PlannedHead()  # nothing folded, rounded to nearest


def is_smoothable(model: Model) -> bool:
    """Whether a scale of the head's input has a place: a final norm that nothing but the head reads."""
    return bool(model.family.final_norm) and not model.family.project_out


@torch.no_grad()
def head_logits(model: Model, scheme: Scheme, hidden: Tensor, planned: PlannedHead = UNPLANNED) -> Tensor:
    """The logits of a scheme's head, (tokens, vocab), in the dtype of its input. hidden: the hidden states after the
    last layer, (tokens, hidden). planned: the head of the plan, which counts where the scheme's is in INT8."""
    return int8_logits(model, hidden, planned) if scheme.head.quantized else decoder.logits(model, hidden)


@torch.no_grad()
def int8_logits(model: Model, hidden: Tensor, planned: PlannedHead = UNPLANNED) -> Tensor:
    """The logits of a head in INT8; the arguments are those of `head_logits`."""
    x = decoder.head_input(model, hidden, planned.norm(model))
    parts = []
    for weight, scale in planned.int8_rows(model):
        parts.append(w8a8_linear(x, weight.to(x.device), scale.to(x.device), INPUT))
    return decoder.finished(model, torch.cat(parts, dim=-1))


@torch.no_grad()
def smoothed_logits(model: Model, hidden: Tensor, planned: PlannedHead) -> Tensor:
    """The logits of the smoothed head in float, (tokens, vocab), in the dtype of `hidden`, (tokens, hidden)."""
    x = decoder.head_input(model, hidden, planned.norm(model))
    parts = [functional.linear(x, rows.to(x.device, x.dtype)) for rows in planned.smoothed_rows(model)]
    return decoder.finished(model, torch.cat(parts, dim=-1))
