"""A model of which config.json alone is here: its weights are not downloaded yet.

The family record and config.json say the name and the shape of every tensor, and config.json as a rule their dtype. So
everything that goes by shapes can be asked of it; what reads weights raises CheckpointError.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from smoothquant.checkpoint import Checkpoint, TensorInfo
from smoothquant.device import declared_dtype
from smoothquant.errors import CheckpointError
from smoothquant.model import Model

WEIGHTS = ("*.safetensors", "*.bin")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a file of weights."""
    return any(True for pattern in WEIGHTS for _ in folder.glob(pattern))


class AnnouncedCheckpoint(Checkpoint):
    """A checkpoint folder without weights. `tensors` is empty until its model fills it in."""

    @property
    def notes(self) -> tuple[str, ...]:
        told = [f"{self.folder}: no weights are here: this goes by config.json alone"]
        if not (self.config.get("dtype") or self.config.get("torch_dtype")):
            told.append(f"{self.folder}/config.json says no dtype: 16 bits are assumed")
        if self._quantization is not None:
            told.append(f"{self.folder}/config.json tells of quantized weights: the float model is assumed")
        return tuple(told)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        raise CheckpointError(
            f"{self.folder}: no weights, as {name}", expected="model.safetensors", do="download them first"
        )

    def _index(self) -> None:
        """There is nothing to look at."""


class AnnouncedModel(Model):
    """The model of an `AnnouncedCheckpoint`: its tensors are those that family and config.json call for."""

    def _check_tensors(self) -> None:
        dtype = declared_dtype(self.checkpoint.config, torch.bfloat16)
        file = self.checkpoint.folder / "model.safetensors"
        self.checkpoint.tensors |= {name: TensorInfo(file, shape, dtype) for name, shape in self.expected().items()}
