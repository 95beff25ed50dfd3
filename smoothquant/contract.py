"""The contract of smoothing, enforced at run time: smoothed float logits equal the original's.

A few tokens go through every stored layer in float32, and from the same input through the smoothed layer. The first
layer whose outputs differ by more than the tolerance is named. At the end the logits are compared.

Each layer is compared by itself, since a sum of all layers' rounding errors says nothing of smoothing: layers with
massive activations make them ten times larger. What float32 cannot tell apart, as behind attention whose keys have
large biases (Qwen2), float64 decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.errors import ContractError
from smoothquant.head import UNPLANNED, PlannedHead, smoothed_logits
from smoothquant.hidden import PREFIX
from smoothquant.layers import Layer
from smoothquant.model import Model
from smoothquant.stream import SmoothedLayer
from smoothquant.sweep import FLOAT, Sweep

TOLERANCE = 1e-5
TOKENS = 16


class Contract:
    """The check of a contract beside the stream: `check` every layer in order, then `finish`.

    state: the `state()` of an interrupted run, which is continued. Other entries in it are ignored.
    """

    def __init__(self, model: Model, state: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        ids = torch.linspace(0, model.geometry.vocab_size - 1, TOKENS).long()  # spread over the vocabulary
        self._sweep = Sweep(model, (ids,), ())
        kept = PREFIX + FLOAT
        if state and kept in state:
            self._sweep.restore(0, {kept: state[kept]})
        else:
            self._sweep.embed()

    def state(self) -> dict[str, Tensor]:
        """The hidden states before the next layer, float32 (tokens, hidden)."""
        return {name: found.clone() for name, found in self._sweep.hidden.state(0).items()}

    def check(self, layer: SmoothedLayer) -> None:
        """Raise ContractError if smoothing has changed the output of this layer."""
        self.run_original(layer.source)
        self.run_smoothed(layer)

    def run_original(self, layer: Layer) -> None:
        """Run the stored layer, whose scales need not be chosen yet."""
        self._before = self._sweep.states(0).clone()
        self._sweep.take(layer)

    def run_smoothed(self, layer: SmoothedLayer, running: Layer | None = None) -> None:
        """Run the smoothed layer after it. Raises ContractError if their outputs differ. running: a layer to run in its
        place."""
        before, found = self._before, self._after(running or layer, self._before)
        error = relative_error(found, self._sweep.states(0))
        self._judge(error, f"the output of layer {layer.index}", lambda: self._apart(layer, before.double()))

    @torch.no_grad()
    def finish(self, head: PlannedHead = UNPLANNED) -> float:
        """Compare the logits. Returns their relative error. head: of the smoothed model."""

        def apart(hidden: Tensor) -> float:
            return relative_error(smoothed_logits(self.model, hidden, head), decoder.logits(self.model, hidden))

        hidden = self._sweep.states(0)
        return self._judge(apart(hidden), "the logits", lambda: apart(hidden.double()))

    def _apart(self, layer: SmoothedLayer, before: Tensor) -> float:
        """How far the outputs of the smoothed and the stored layer are apart. before: their input, (tokens, hidden)."""
        return relative_error(self._after(layer, before), self._after(layer.source, before))

    @torch.no_grad()
    def _after(self, layer: Layer, before: Tensor) -> Tensor:
        """The output of a layer, (tokens, hidden), in the dtype of its input."""
        positions = patterns(self.model, len(before), before.dtype).upto(len(before))
        return decoder.forward(self.model, layer, before[None], positions)[0]

    def _judge(self, error: float, where: str, exactly: Callable[[], float]) -> float:
        """The error, or, beyond the tolerance, that of `exactly`. Raises ContractError if this one is beyond it too."""
        if not error <= TOLERANCE:  # NaN fails too
            error = exactly()
        if not error <= TOLERANCE:
            raise ContractError(
                f"smoothing changed {where} by {error:.1e}",
                expected=f"at most {TOLERANCE:.0e}",
                do="check the family record (which norm feeds which linears), or lower alpha",
            )
        return error


def relative_error(found: Tensor, reference: Tensor) -> float:
    """The norm of the difference over the norm of the reference, in float64."""
    difference = (found.double() - reference.double()).norm()
    return (difference / reference.double().norm().clamp_min(1e-300)).item()
