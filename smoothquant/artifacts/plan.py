"""The plan of a search, a folder: what was tried for each group of linears, what it gave, and what was chosen.

    plan.json                  the record below: choices, errors, candidates, the curve of float bytes against KL
    act_scales.safetensors     the ranges that the search measured, as `smoothquant calibrate` writes them
    layers/00000.safetensors   of each layer, what an export stores (`smoothquant.plan`)
    head.safetensors           of the output head, where it is in INT8
    smoothquant/manifest.json

With the model, it is all that an export and its validation need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smoothquant.scheme import Scheme
from smoothquant.settings import SmoothingSettings

PLAN = "plan.json"
ACT_SCALES = "act_scales.safetensors"
HEAD = "head.safetensors"
STEP = "search"
NONE, BALANCED = "none", "balanced"  # names of candidates; all others are alphas
NEAREST, FEEDBACK = "nearest", "error feedback"
WHOLE = "1"  # name of the share of values that saturate nowhere
CORRECTED = " and bias"  # behind the name of a rounding


@dataclass(frozen=True)
class GroupChoice:
    """The scales of one smoothing group. linears: module names of those that read the smoothed input. through: where
    the scales are folded. tried: by candidate ("none", an alpha, "balanced"), the expected noise of the linears'
    outputs over their signal. chosen: the candidate that was taken."""

    layer: int
    linears: tuple[str, ...]
    through: str
    tried: Mapping[str, float]
    chosen: str


@dataclass(frozen=True)
class LinearChoice:
    """How one linear is stored. rounding: "nearest" or "error feedback". errors: by rounding, and with
    " and bias" where its bias was corrected, too, the squared error of its output over the square of its output, on
    tokens that rounding has not seen. loss: what it adds to the KL, in nats (`act_scales.search.divergence`)."""

    name: str
    numbers: int
    rounding: str
    errors: Mapping[str, float]
    loss: float = 0.0


@dataclass(frozen=True)
class CacheChoice:
    """The scale of a layer's values in an 8-bit cache. tried: by the share of their maximum from which on they
    saturate, the squared error of values over their squares. chosen: the share that was taken."""

    layer: int
    tried: Mapping[str, float]
    chosen: float


@dataclass(frozen=True)
class PlanOutcome:
    """What a model computes on the tokens kept apart. share: bytes of linears in float over the INT8 bytes of all."""

    name: str
    share: float
    kl: float
    perplexity_ratio: float
    top1: float


@dataclass(frozen=True)
class HeadChoice:
    """The output head in INT8. tried: by candidate for the scale of its input, and by rounding of its weight, the mean
    KL from the float head to this one, both behind the quantized layers, on tokens kept apart. scale, rounding: those
    that were taken. in_float, in_int8: what the whole model computes with either head, its linears in INT8. The curve
    is of the scheme's: a head in INT8 that costs more than was wanted stays in float."""

    tried: Mapping[str, Mapping[str, float]]
    scale: str
    rounding: str
    in_float: PlanOutcome
    in_int8: PlanOutcome


@dataclass(frozen=True)
class EmbeddingChoice:
    """The embedding in INT8. in_float, in_int8: what the whole model computes with either, with head and linears as the
    scheme has them. The curve is of a float embedding."""

    in_float: PlanOutcome
    in_int8: PlanOutcome


@dataclass(frozen=True)
class PlanFacts:
    """The record of a plan. text: fingerprint of the text. tokens: those that it was made from. apart: those that only
    judge. trial: those that candidates were made from; some of `apart` judged them. width: channels in the blocks of
    second moments. candidates: the models that were run end to end, the chosen one by `chosen`. curve: the chosen one
    with linears in float. max_positions: the length whose rotary frequencies were chosen, where a model has several.
    head, embedding: the output head and the embedding in INT8, where one was looked for. caches: of the layers of an
    8-bit KV cache whose keys and values have a scale each."""

    model: str
    family: str
    smoothing: SmoothingSettings
    scheme: Scheme
    text: str
    tokens: int
    apart: int
    trial: int
    width: int
    groups: tuple[GroupChoice, ...]
    linears: tuple[LinearChoice, ...]
    candidates: tuple[PlanOutcome, ...]
    chosen: str
    curve: tuple[PlanOutcome, ...]
    max_positions: int | None = None
    head: HeadChoice | None = None
    embedding: EmbeddingChoice | None = None
    caches: tuple[CacheChoice, ...] = ()
