"""Choose whether the embedding is in INT8, behind all other choices: the model with it is run once, end to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from act_scales.search.budget import measured
from act_scales.search.passes import SearchTarget
from smoothquant.artifacts.plan import EmbeddingChoice, PlanFacts
from smoothquant.embedding import embedding_of
from smoothquant.fold import SmoothedLayer
from smoothquant.head import UNPLANNED, PlannedHead
from smoothquant.static import numbers_of
from smoothquant.sweep import Sweep


def with_embedding(
    target: SearchTarget,
    facts: PlanFacts,
    smoothed: Callable[[int], SmoothedLayer],
    sequences: tuple[Tensor, ...],
    reference: Sweep,
    progress: Callable[[int], None],
    head: PlannedHead | None,
    limit: float,
) -> PlanFacts:
    """The facts of a plan with what the target's embedding costs, and with it where its KL is within the limit.

    The arguments are those of `budget.measured`. With a limit, an embedding that is tied to a float head is not looked
    at: the head keeps the float table.
    """
    model, scheme = target.model, replace(facts.scheme, embedding=target.scheme.embedding)
    useless = model.geometry.tied_embeddings and head is None and math.isfinite(limit)
    if useless or not scheme.embedding.quantized:
        return facts
    embedding, point = embedding_of(model, scheme, head or UNPLANNED), facts.scheme.float_linears
    [found] = measured(target, smoothed, [point], sequences, reference, progress, head, embedding)
    share = numbers_of(model, point) / numbers_of(model)
    in_float = min(facts.curve, key=lambda one: abs(one.share - share))
    choice = EmbeddingChoice(in_float, found.outcome(facts.chosen, share))
    taken = choice.in_int8.kl - choice.in_float.kl <= limit
    return replace(facts, embedding=choice, scheme=scheme if taken else facts.scheme)
