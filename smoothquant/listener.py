"""What a sweep over the layers calls: an object that hears them and collects results."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from torch import Tensor

from smoothquant.embedding import Embedding
from smoothquant.hidden import Forms
from smoothquant.layers import FloatLayer, Layer
from smoothquant.team import Team


class Listener:
    """An object that a sweep calls. This class does nothing; its subclasses collect results.

    For every layer the sweep calls `enter`; then for every batch of sequences `listen` for each linear, `residual` and
    `advance`; then `merge`, and `leave`.

    forms: the other forms of the layers that run beside the stored form, each with hidden states of its own.
    tokens: how many of the first tokens it hears, rounded up to whole batches; its forms run on these alone. None for
        all.
    embedding: what embeds the tokens for them; None for the embedding of the sweep.
    """

    forms: Forms = MappingProxyType({})
    tokens: int | None = None
    embedding: Embedding | None = None

    def enter(self, source: FloatLayer) -> Mapping[str, Layer]:
        """Begin a layer. Returns its other forms, by name, on the device of the sweep."""
        return {}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        """Hear a linear of the stored layer. x: its input, (..., in). y: its output, (..., out)."""

    def residual(self, x: Tensor) -> None:
        """x: (sequences, tokens, hidden): the residual stream of the checkpoint's own layer, as the layer reads it and
        whenever something has been added to it, and what is added."""

    def advance(self, hidden: Mapping[str, Tensor]) -> None:
        """Hear the output of the layer for one batch. hidden: the output of each form, (sequences, tokens, hidden)."""

    def merge(self, team: Team) -> None:
        """Put together what all ranks have heard of the layer: each has all of it then."""

    def leave(self) -> None:
        """End the layer and compute its results."""

    @property
    def leftover(self) -> Collection[str]:
        """The names of statistics of this layer that `leave` could not assign to a matrix."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """The results of all layers so far, by name."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the results out of an earlier `state`."""
