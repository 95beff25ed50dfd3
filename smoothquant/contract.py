"""The contract of smoothing, enforced at run time: smoothed float logits equal the original's.

A few tokens go through every layer twice, as it is on disk and with smoothing folded in, in float32. The first
layer whose outputs differ by more than the tolerance is named; at the end the logits are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.errors import ContractError
from smoothquant.layers import Layer
from smoothquant.model import Model
from smoothquant.stream import SmoothedLayer

TOLERANCE = 1e-5
TOKENS = 16


class Contract:
    """Runs beside the stream: `check` every layer in order, then `finish`.

    state: `state()` of an earlier, interrupted run, to go on from there.
    """

    def __init__(self, model: Model, state: dict[str, Tensor] | None = None) -> None:
        self.model = model
        self.patterns = patterns(model, TOKENS, torch.float32)
        if state:
            self.original, self.smoothed = state["original"], state["smoothed"]
        else:
            ids = torch.linspace(0, model.geometry.vocab_size - 1, TOKENS).long()[None]  # spread over the vocabulary
            self.original = self.smoothed = decoder.embed(model, ids, torch.float32)

    def state(self) -> dict[str, Tensor]:
        """What the next layer starts from: two tensors (1, tokens, hidden) float32."""
        return {"original": self.original, "smoothed": self.smoothed.clone()}

    @torch.no_grad()
    def check(self, layer: SmoothedLayer, running: Layer | None = None) -> None:
        """Raise ContractError if this layer, smoothed, is not what it was. running: what to run in its place."""
        self.original = decoder.forward(self.model, layer.source, self.original, self.patterns)
        self.smoothed = decoder.forward(self.model, running or layer, self.smoothed, self.patterns)
        self._compare(self.original, self.smoothed, f"layer {layer.index}")

    @torch.no_grad()
    def finish(self) -> float:
        """Compare the logits. Returns their relative error."""
        original, smoothed = (decoder.logits(self.model, hidden) for hidden in (self.original, self.smoothed))
        return self._compare(original, smoothed, "the logits")

    def _compare(self, original: Tensor, smoothed: Tensor, where: str) -> float:
        error = relative_error(smoothed, original)
        if not error <= TOLERANCE:  # NaN fails too
            raise ContractError(
                f"smoothing changed the model: {where} differ by {error:.1e}",
                expected=f"at most {TOLERANCE:.0e} in float32",
                do="check the family record (which norm feeds which linears), or lower alpha",
            )
        return error


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference, in float64."""
    difference = (found.double() - reference.double()).norm()
    return (difference / reference.double().norm().clamp_min(1e-300)).item()
