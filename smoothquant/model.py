"""A checkpoint seen through its family: every tensor accounted for, read part by part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smoothquant.checkpoint import Checkpoint
from smoothquant.errors import CheckpointError
from smoothquant.family import ACTIVATIONS, Family, Geometry, SmoothingGroup
from smoothquant.quantization import absmax

ROWS = 2048  # rows of an embedding or lm_head handed over at a time


class Model:
    """One checkpoint with its family record and its numbers.

    Raises CheckpointError when the config lacks a number or contradicts the weights: a tensor is missing, has another
    shape, or is one that the family does not know.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self.checkpoint, self.family = checkpoint, family
        try:
            self.geometry: Geometry = family.geometry(checkpoint.config)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: cannot read the numbers of a {family.name} ({error!r})",
                expected=f"the keys of a {family.architectures[0]}",
                do="restore the config.json that came with the weights",
            ) from error
        self._check_numbers()
        self._check_tensors()

    # -- names ---------------------------------------------------------------------------------------------------

    def linear(self, layer: int, role: str) -> str:
        """Module name of a linear: linear(0, "q") -> "model.layers.0.self_attn.q_proj"."""
        return self.family.module(layer, self.family.linears[role])

    def norm(self, layer: int, role: str) -> str:
        """Module name of a layer's norm: norm(0, "mlp") -> "model.layers.0.post_attention_layernorm"."""
        return self.family.module(layer, self.family.norms[role])

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Module name and (out, in) of every linear that gets quantized, in order."""
        for layer in range(self.geometry.layers):
            for role in self.family.linears:
                yield self.linear(layer, role), self.family.shape(role, self.geometry)

    def group_source(self, layer: int, group: SmoothingGroup) -> str:
        """Module name of what a smoothing group folds into."""
        return self.norm(layer, group.source) if group.through == "norm" else self.linear(layer, group.source)

    @property
    def lm_head(self) -> str:
        """Name of the tensor that the logits are computed with: the embedding's where they are tied."""
        return f"{self.family.embedding if self.geometry.tied_embeddings else self.family.lm_head}.weight"

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype it has on disk; CheckpointError, naming it, if it holds NaN or Inf."""
        return self._finite(name, self.checkpoint.read(name))

    def rows(self, name: str, step: int = ROWS) -> Iterator[Tensor]:
        """A large tensor, `step` rows at a time, checked like `read`."""
        for start in range(0, self.checkpoint.tensors[name].shape[0], step):
            yield self._finite(name, self.checkpoint.read(name, slice(start, start + step)))

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding for token ids (...,) int64; returns (..., hidden) in the dtype on disk."""
        unique, where = torch.unique(ids, return_inverse=True)
        found = torch.empty(len(unique), self.geometry.hidden_size, dtype=self.checkpoint.dtype)
        for start, rows in enumerate(self.rows(f"{self.family.embedding}.weight")):
            start *= ROWS
            inside = (unique >= start) & (unique < start + len(rows))
            found[inside] = rows[unique[inside] - start].to(found.dtype)
        return found[where]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., hidden) after the final norm, float; returns (..., vocab) in its dtype."""
        parts = [torch.nn.functional.linear(hidden, rows.to(hidden.dtype)) for rows in self.rows(self.lm_head)]
        return torch.cat(parts, dim=-1)

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not absmax(tensor.view(tensor.shape[0], -1), dim=0).isfinite().all():
            raise CheckpointError(
                f"{self.checkpoint.tensors[name].file}: tensor {name} holds NaN or Inf",
                expected="finite weights",
                do="download this file again, or ask who trained the model",
            )
        return tensor

    # -- checks --------------------------------------------------------------------------------------------------

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the family and the config call for."""
        return self.family.tensors(self.geometry)

    def _check_numbers(self) -> None:
        geometry, config = self.geometry, self.checkpoint.folder / "config.json"
        if geometry.heads % geometry.kv_heads:
            raise CheckpointError(
                f"{config}: {geometry.heads} attention heads over {geometry.kv_heads} kv heads",
                expected="a multiple",
                do="restore the config.json that came with the weights",
            )
        if geometry.activation not in ACTIVATIONS:
            raise CheckpointError(
                f"{config}: activation {geometry.activation!r} is not supported",
                expected=f"one of {', '.join(ACTIVATIONS)}",
                do="export a model with one of these",
            )

    def _check_tensors(self) -> None:
        found, expected = self.checkpoint.tensors, self.expected()
        restore = "check that config.json and the weights belong to the same model"
        for name, shape in expected.items():
            if name not in found:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: tensor {name} is missing", expected=f"shape {list(shape)}", do=restore
                )
            if found[name].shape != shape:
                raise CheckpointError(
                    f"{found[name].file}: tensor {name} has shape {list(found[name].shape)}",
                    expected=f"{list(shape)} by config.json",
                    do=restore,
                )
        tied = (f"{self.family.lm_head}.weight",) if self.geometry.tied_embeddings else ()
        for name in found.keys() - expected.keys():
            if not name.endswith(self.family.ignored + tied):
                raise CheckpointError(
                    f"{found[name].file}: tensor {name} is not part of a {self.family.name} with this config.json",
                    do=restore,
                )
