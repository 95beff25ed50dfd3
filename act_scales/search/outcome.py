"""What a quantized model computes on tokens that it was not made from, against the float model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant import decoder
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


@torch.no_grad()
def distance(model: Model, sequences: tuple[Tensor, ...], reference: Sweep, found: Sweep) -> Distance:
    """The distance of a model from the reference after the last layer of both. sequences: ids of each."""
    kl, top, losses, tokens, predicted = 0.0, 0, 0.0, 0, 0
    for number, ids in enumerate(sequences):
        wanted, made = reference.states(number), found.states(number)
        for start in range(0, len(ids), ROWS):
            part = slice(start, start + ROWS)
            true, other = (decoder.logits(model, each[part][None])[0].log_softmax(-1) for each in (wanted, made))
            kl += (true.exp() * (true - other)).sum(-1).double().sum().item()
            top += int((true.argmax(-1) == other.argmax(-1)).sum())
            after = ids[start + 1 : start + 1 + len(true)].to(true.device)[:, None]
            losses += (true[: len(after)] - other[: len(after)]).gather(1, after).double().sum().item()
            tokens, predicted = tokens + len(true), predicted + len(after)
    return Distance(max(kl, 0.0) / tokens, math.exp(losses / max(predicted, 1)), top / tokens)
