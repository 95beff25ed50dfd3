"""What a quantized model computes on tokens that it was not made from, against the float model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from smoothquant import decoder
from smoothquant.artifacts.plan import PlanOutcome
from smoothquant.head import PlannedHead, int8_logits
from smoothquant.model import Model
from smoothquant.sweep import Sweep

ROWS = 256  # tokens whose logits are compared at a time


@dataclass(frozen=True)
class Distance:
    """kl: mean of KL(float || quantized) over tokens, in nats. perplexity_ratio: quantized over float. top1: the share
    of tokens with the same likeliest successor."""

    kl: float
    perplexity_ratio: float
    top1: float

    def outcome(self, name: str, share: float) -> PlanOutcome:
        """This, for the record. name: of what was chosen. share: of the bytes, in float."""
        return PlanOutcome(name, share, self.kl, self.perplexity_ratio, self.top1)


@torch.no_grad()
def distances(
    model: Model,
    sequences: tuple[Tensor, ...],
    reference: Sweep,
    found: Sequence[Sweep],
    head: PlannedHead | None = None,
) -> list[Distance]:
    """The distances of models from the reference, each after the last layer. sequences: ids of each. head: the output
    head in INT8 of all models; None for the float one."""
    logits = decoder.logits if head is None else partial(int8_logits, planned=head)
    sums, tokens, predicted = [_Sums() for _ in found], 0, 0
    for number, ids in enumerate(sequences):
        wanted = reference.states(number)
        for start in range(0, len(ids), ROWS):
            part = slice(start, start + ROWS)
            true = decoder.logits(model, wanted[part]).log_softmax(-1)
            share, best = true.exp(), true.argmax(-1)
            after = ids[start + 1 : start + 1 + len(true)].to(true.device)[:, None]
            for one, sweep in zip(sums, found, strict=True):
                other = logits(model, sweep.states(number)[part]).log_softmax(-1)
                apart = true - other
                one.kl += (share * apart).sum(-1).double().sum().item()
                one.top += int((other.argmax(-1) == best).sum())
                one.losses += apart[: len(after)].gather(1, after).double().sum().item()
            tokens, predicted = tokens + len(true), predicted + len(after)
    return [
        Distance(max(one.kl, 0.0) / tokens, math.exp(one.losses / max(predicted, 1)), one.top / tokens) for one in sums
    ]


@dataclass
class _Sums:
    """Over tokens: of the KL, of those with the same likeliest successor, and of losses less the reference's."""

    kl: float = 0.0
    top: int = 0
    losses: float = 0.0
