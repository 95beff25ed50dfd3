"""What an engine is to everybody above it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

from torch import Tensor

from smoothquant.artifacts.manifest import Manifest

FOREIGN = "another TensorRT-LLM converter"  # the step of a checkpoint that carries no manifest
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")  # what such a checkpoint says of its model


class Engine(Protocol):
    """Something that computes logits. manifest: of its folder."""

    manifest: Manifest

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """The float32 logits (batch, tokens, vocab) of whole sequences. ids: (batch, tokens) int64, no padding."""
