"""The contract of smoothing, enforced at run time: smoothed float logits equal the original's.

A few tokens go through every layer twice in float32: through the stored layer and through the smoothed layer. The first
layer whose outputs differ by more than the tolerance is named. At the end the logits are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from smoothquant import decoder
from smoothquant.errors import ContractError
from smoothquant.head import UNPLANNED, PlannedHead, smoothed_logits
from smoothquant.hidden import PREFIX
from smoothquant.layers import Layer
from smoothquant.model import Model
from smoothquant.stream import SmoothedLayer
from smoothquant.sweep import FLOAT, Listener, Sweep

TOLERANCE = 1e-5
TOKENS = 16
SMOOTHED = "smoothed"


class Contract:
    """The check of a contract beside the stream: `check` every layer in order, then `finish`.

    state: the `state()` of an interrupted run, which is continued. Other entries in it are ignored.
    """

    def __init__(self, model: Model, state: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        ids = torch.linspace(0, model.geometry.vocab_size - 1, TOKENS).long()  # spread over the vocabulary
        self._sweep = Sweep(model, (ids,), (_Forms(),))
        if state:
            self._sweep.restore(0, {name: found for name, found in state.items() if name.startswith(PREFIX)})
        else:
            self._sweep.embed()

    def state(self) -> dict[str, Tensor]:
        """The original and the smoothed hidden states before the next layer, float32 (tokens, hidden) each."""
        return {name: found.clone() for name, found in self._sweep.hidden.state(0).items()}

    def check(self, layer: SmoothedLayer) -> None:
        """Raise ContractError if smoothing has changed the output of this layer."""
        self.run_original(layer.source)
        self.run_smoothed(layer)

    def run_original(self, layer: Layer) -> None:
        """Run the stored layer, whose scales need not be chosen yet."""
        self._sweep.take(layer)

    def run_smoothed(self, layer: Layer) -> None:
        """Run the smoothed layer after it. Raises ContractError if their outputs differ."""
        self._sweep.take(layer, SMOOTHED)
        original, smoothed = (self._sweep.states(0, form) for form in (FLOAT, SMOOTHED))
        self._compare(original, smoothed, f"layer {layer.index}")

    @torch.no_grad()
    def finish(self, head: PlannedHead = UNPLANNED) -> float:
        """Compare the logits. Returns their relative error. head: of the smoothed model."""
        original = decoder.logits(self.model, self._sweep.states(0, FLOAT))
        smoothed = smoothed_logits(self.model, self._sweep.states(0, SMOOTHED), head)
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


class _Forms(Listener):
    """Has the sweep hold hidden states of the smoothed layers, too."""

    forms = MappingProxyType({SMOOTHED: torch.float32})


def relative_error(found: Tensor, reference: Tensor) -> float:
    """The norm of the difference over the norm of the reference, in float64."""
    difference = (found.double() - reference.double()).norm()
    return (difference / reference.double().norm().clamp_min(1e-300)).item()
