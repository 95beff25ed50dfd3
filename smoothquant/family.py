"""The schema of a decoder family: what an architecture is, as data.

A `Family` names the parts of one architecture's checkpoint and says which norm or linear feeds which. The
readers, the decoder, smoothing and every exporter work from this record and from the `Geometry` of one model
(its numbers, read from config.json); none of them knows an architecture by name. A family is declared in one
file of `recipes/`, or in a user's own (`--family my_family.py`).

    hidden --norm--> q, k, v --attention--> o --+--> norm --> gate, up --act(gate) * up--> down --+-->
       \\________________________________________/ \\________________________________________________/
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smoothquant.errors import CheckpointError


@dataclass(frozen=True)
class SmoothingGroup:
    """Linears that share one input, and what produces it.

    source: the norm (or linear) whose output feeds them, so that 1/s folds into it.
    linears: the consumers, one common s.
    through: what lies between: "norm" (source is the norm itself), "attention" (source is v: channels are shared
        by the query heads of a kv head), "product" (channel-wise and homogeneous in the source: act(gate) * up, ReLU).
    """

    source: str
    linears: tuple[str, ...]
    through: str = "norm"


@dataclass(frozen=True)
class Geometry:
    """The numbers of one model. Dimensions count channels, `vocab_size` rows of the embedding."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    activation: str
    inv_freq: Tensor = field(compare=False, repr=False)  # (head_dim / 2,) float32: RoPE, scaling applied
    tied_embeddings: bool = False
    biased: frozenset[str] = frozenset()  # roles of linears that carry a bias: "q", "o", "down", ...

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Family:
    """One architecture. Module names are Hugging Face's; `layer` holds the layer's index as {}.

    name: the family's own name; model_types, architectures: what config.json says of it.
    linears: role -> name within a layer, for the roles q, k, v, o, gate, up, down.
    norms: role -> name within a layer, for the roles attention, mlp.
    groups: smoothing groups by role, norm groups first.
    ignored: ends of tensor names that old checkpoints carry and nobody reads.
    geometry: reads a config.json.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    embedding: str
    layer: str
    final_norm: str
    lm_head: str
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    groups: tuple[SmoothingGroup, ...]
    geometry: Callable[[Mapping], Geometry]
    ignored: tuple[str, ...] = ()

    def shape(self, role: str, geometry: Geometry) -> tuple[int, int]:
        """(out, in) of a linear."""
        hidden, inner = geometry.hidden_size, geometry.intermediate_size
        return {
            "q": (geometry.query_size, hidden),
            "k": (geometry.kv_size, hidden),
            "v": (geometry.kv_size, hidden),
            "o": (hidden, geometry.query_size),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }[role]

    def module(self, layer: int, name: str) -> str:
        """Full module name of a part of a layer: module(3, "mlp.up_proj") -> "model.layers.3.mlp.up_proj"."""
        return f"{self.layer.format(layer)}.{name}"

    def tensors(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint with these numbers, in order."""
        hidden, vocabulary = geometry.hidden_size, geometry.vocab_size
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (vocabulary, hidden)}
        for layer in range(geometry.layers):
            for name in self.norms.values():
                shapes[f"{self.module(layer, name)}.weight"] = (hidden,)
            for role, name in self.linears.items():
                shape = self.shape(role, geometry)
                shapes[f"{self.module(layer, name)}.weight"] = shape
                if role in geometry.biased:
                    shapes[f"{self.module(layer, name)}.bias"] = shape[:1]
        shapes[f"{self.final_norm}.weight"] = (hidden,)
        if not geometry.tied_embeddings:
            shapes[f"{self.lm_head}.weight"] = (vocabulary, hidden)
        return shapes


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
}


def rope_inv_freq(config: Mapping, head_dim: int) -> Tensor:
    """Inverse frequencies of rotary embeddings, (head_dim / 2,) float32, with their scaling applied.

    Reads both spellings of config.json: `rope_parameters` (transformers >= 5) and `rope_theta` + `rope_scaling`.
    Types: default, linear (position interpolation) and llama3 (Llama 3.1's frequency-dependent scaling, as
    published with its reference code). Raises CheckpointError for others.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if kind == "default":
        return inv_freq
    if kind == "linear":
        return inv_freq / rope["factor"]
    if kind == "llama3":
        return _llama3_scaling(inv_freq, rope)
    raise CheckpointError(
        f"config.json: RoPE type {kind!r} is not supported",
        expected="one of default, linear, llama3",
        do="export a checkpoint with one of these",
    )


def _llama3_scaling(inv_freq: Tensor, rope: Mapping) -> Tensor:
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * math.pi / inv_freq
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long waves, slowed; 1: short, kept
    return (1 - blend) * inv_freq / factor + blend * inv_freq
