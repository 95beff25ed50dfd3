"""Say what to change in an export whose engine misses a threshold.

Rounding the weights and rounding the activations both cost accuracy; a greater alpha takes from the second and adds to
the first. What each costs in an engine is measured (`W8A8Stream.weight_share`). Where one costs more than `MOST`, alpha
is to move away from it. (SmolLM2-135M, per token: weights cost .21, .36, .55 and .75 of all with alpha .5, .6, .7 and
.8, and the KL is .0121, .0096, .0111 and .0172.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from builders.validate.layers import LinearError
from smoothquant.artifacts.manifest import Manifest
from smoothquant.roles import parsed

MOST = 2 / 3
ENOUGH = 0.85  # no greater one is advised: static spikes outlive it (SmolLM2 per tensor: KL .039, and .043 with .9)
MODELOPT = "export modelopt"  # whose activations are static, always


def advice(manifest: Manifest, worst: Sequence[LinearError], weight_share: float | None) -> str:
    """The options of `smoothquant export` that may make an engine accurate enough, the strongest first, in one line.

    Empty for an engine in float. manifest: the manifest of the engine or export. worst: the linears with the largest
    errors, worst first. weight_share: the share of the weights in the errors of smoothed linears; None if not measured.
    """
    return "; or ".join(_options(manifest, worst, weight_share))


def _options(manifest: Manifest, worst: Sequence[LinearError], weight_share: float | None) -> Iterator[str]:
    origin, scheme, smoothing = manifest.origin, manifest.origin.scheme, manifest.origin.smoothing
    if not scheme.quantized:
        return
    if origin.plan is not None:
        yield "an export by the same plan with a larger --keep-float"
        if scheme.head.quantized:
            yield "--lm-head float"
        if scheme.embedding.quantized:
            yield "--embedding float"
        return
    if scheme.activations.static:
        if manifest.step != MODELOPT:
            yield "--act per-token instead of per-tensor"
        if worst and origin.trtllm is None:
            roles = dict.fromkeys(parsed(linear.role).kind for linear in worst)
            yield f"--keep-float {','.join(roles)}, where the errors are largest"
    if scheme.kv_cache.quantized:
        yield "--kv float"
    if scheme.head.quantized:
        yield "--lm-head float"
    if scheme.embedding.quantized:
        yield "--embedding float"
    if smoothing.groups == "none":
        yield "smoothing, without --groups none"
    elif weight_share is not None:
        for side, share, whose in (("smaller", weight_share, "weights"), ("greater", 1 - weight_share, "activations")):
            if share > MOST and (side == "smaller" or smoothing.alpha < ENOUGH):
                yield f"a {side} --alpha than {smoothing.alpha:g}, since {share:.0%} of the error is that of {whose}"
