"""What a quantized model computes on tokens that it was not made from, against the float model.

With p the probabilities by the float model, and d what quantization adds to the logits, less its mean by p,

    KL  =  log E_p[exp d]
"""

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
MOST = 80.0  # added to a logit: beyond that, a model is of no use, and float32 ends


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
            true = decoder.logits(model, wanted[part])
            share, best = true.softmax(-1), true.argmax(-1, keepdim=True)
            after = ids[start + 1 : start + 1 + len(true)].to(true.device)[:, None]
            for one, sweep in zip(sums, found, strict=True):
                other = logits(model, sweep.states(number)[part])
                one.top += int((other.gather(1, best)[:, 0] == other.amax(-1)).sum())
                added = other.sub_(true)
                added -= torch.linalg.vecdot(share, added)[:, None]
                likelier = added[: len(after)].gather(1, after)[:, 0]
                kl = torch.linalg.vecdot(share, added.clamp_max_(MOST).expm1_()).log1p()
                one.kl += kl.double().sum().item()
                one.losses += (kl[: len(after)] - likelier).double().sum().item()
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
