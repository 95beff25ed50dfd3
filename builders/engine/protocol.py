"""The protocol of engines, which everything above them uses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from smoothquant.artifacts.manifest import Manifest

if TYPE_CHECKING:
    from torch import Tensor

FOREIGN = "another TensorRT-LLM converter"  # the step of a checkpoint that carries no manifest
ANYBODY = "another quantizer"  # the step of an INT8 folder that carries no manifest


@dataclass(frozen=True)
class ForeignInputs:
    """The sizes of a model and its quantization, from the files of another tool's checkpoint."""

    dtype: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    quantization: Mapping[str, Any] | None


class Engine(Protocol):
    """An object that computes logits. manifest: the manifest of its folder."""

    manifest: Manifest

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """The float32 logits (batch, tokens, vocab) of whole sequences. ids: (batch, tokens) int64, no padding."""
