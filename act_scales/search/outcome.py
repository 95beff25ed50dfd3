"""What a quantized model computes on tokens that it was not made from, against the float model."""

from __future__ import annotations

import math
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
def distance(
    model: Model,
    sequences: tuple[Tensor, ...],
    reference: Sweep,
    found: Sweep,
    head: PlannedHead | None = None,
) -> Distance:
    """The distance of a model from the reference after the last layer of both. sequences: ids of each. head: the
    model's output head in INT8; None for the float one."""
    logits = decoder.logits if head is None else partial(int8_logits, planned=head)
    kl, top, losses, tokens, predicted = 0.0, 0, 0.0, 0, 0
    for number, ids in enumerate(sequences):
        wanted, made = reference.states(number), found.states(number)
        for start in range(0, len(ids), ROWS):
            part = slice(start, start + ROWS)
            true = decoder.logits(model, wanted[part]).log_softmax(-1)
            other = logits(model, made[part]).log_softmax(-1)
            kl += (true.exp() * (true - other)).sum(-1).double().sum().item()
            top += int((true.argmax(-1) == other.argmax(-1)).sum())
            after = ids[start + 1 : start + 1 + len(true)].to(true.device)[:, None]
            losses += (true[: len(after)] - other[: len(after)]).gather(1, after).double().sum().item()
            tokens, predicted = tokens + len(true), predicted + len(after)
    return Distance(max(kl, 0.0) / tokens, math.exp(losses / max(predicted, 1)), top / tokens)
