"""The schema of a decoder family: what an architecture is, as data.

A `Family` names the parts of one architecture's checkpoint and says which norm or linear feeds which. The
readers, the decoder, smoothing and every exporter work from this record and from the `Geometry` of one model
(its numbers, read from config.json); none of them knows an architecture by name. A family is declared in one
file of `recipes/`, or in a user's own (`--family my_family.py`).

    hidden --norm--> q, k, v --attention--> o --+--> norm --> gate, up --act(gate) * up--> down --+-->
       \\________________________________________/ \\________________________________________________/

Roles name the linears of a layer: q, k, v, o, gate (only where the MLP is gated), up, down, and router where there
are experts, which have a gate, up and down each ("gate.0", "up.0", "down.0", "gate.1", ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from smoothquant.config import Config
from smoothquant.roles import ROUTER, Role, parsed

THROUGH = ("norm", "attention", "product")  # the operations between the linears of a group and their source


@dataclass(frozen=True)
class SmoothingGroup:
    """Linears that share one input, and the source of that input.

    source: the role of the norm or linear whose output feeds them; 1/s folds into it.
    linears: the roles of the consumers, which have one common s. Roles of experts stand for those of every expert.
    through: the operation between them: "norm" (the source is the norm itself), "attention" (the source is v, whose
        channels the query heads of a kv head share) or "product" (channel-wise and homogeneous in the source:
        act(gate) * up, ReLU). Some settings, but no family, say "run-time": there is no source, and the engine divides
        the input by s.
    """

    source: str
    linears: tuple[str, ...]
    through: str = "norm"


@dataclass(frozen=True)
class Attention:
    """The properties of attention that may differ between layers.

    window: the number of newest keys that a query sees, its own included; None for all keys.
    inv_freq: the inverse frequencies of the rotary embedding, scaling applied, as float32 numbers: one for every two
        rotated channels of a head. Empty without a rotary embedding.
    rotary_scale: the factor of its cosines and sines.
    long_inv_freq: the inverse frequencies for sequences beyond `short_positions` tokens (LongRoPE). Empty if `inv_freq`
        holds for all sequences.
    """

    window: int | None = None
    inv_freq: tuple[float, ...] = field(default=(), repr=False)
    rotary_scale: float = 1.0
    long_inv_freq: tuple[float, ...] = field(default=(), repr=False)
    short_positions: int = 0

    def chosen(self, long: bool) -> Attention:
        """The same attention with one set of frequencies: the long set if `long` and there is one."""
        if not self.long_inv_freq:
            return self
        inv_freq = self.long_inv_freq if long else self.inv_freq
        return replace(self, inv_freq=inv_freq, long_inv_freq=(), short_positions=0)


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al., ICLR 2022): the slope of the head times the position of the key.

    scaled: whether the bias is added before the scores are multiplied by the attention scale (Falcon), or after it
        (BLOOM).
    dtype: the dtype that the products are rounded to, as in training.
    """

    scaled: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Geometry:
    """The numbers of one model. Sizes count channels; `vocab_size` counts rows of the embedding.

    intermediate_size: the size of the MLP, or of one expert.
    attention: one entry for each layer. biased: the roles of linears with a bias ("gate", "up" and "down" stand for
    those of every expert).
    attention_scale: the factor of the scores; None for 1 / sqrt(head_dim). *_softcap: c of c * tanh(x / c); 0 for none.
    embedding_scale: the factor of the embedding. embedding_size: its channels; 0 for hidden_size.
    residual_scale: the factor of the output of each branch. logits_scale: the factor of the logits.
    experts, experts_per_token: their numbers in every layer's MLP; 0 if it is dense.
    normalized_shares: whether a token's shares of its experts are normalized to the sum 1.
    """

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
    attention: tuple[Attention, ...]
    tied_embeddings: bool = False
    biased: frozenset[str] = frozenset()
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    embedding_scale: float = 1.0
    embedding_size: int = 0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    experts: int = 0
    experts_per_token: int = 0
    normalized_shares: bool = True

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """The factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def embedded_size(self) -> int:
        """The number of channels of the embedding and of the output head's input."""
        return self.embedding_size or self.hidden_size

    @property
    def short_positions(self) -> int:
        """The longest sequence for LongRoPE's short frequencies; 0 if one set holds for all sequences."""
        return max(kind.short_positions for kind in self.attention)

    def upto(self, length: int | None) -> Geometry:
        """The numbers for sequences of up to `length` tokens, with one set of frequencies and its positions.

        length: None stands for the short frequencies of a model with two sets.
        """
        short = self.short_positions
        if not short:
            return self
        long = length is not None and length > short
        kinds = tuple(kind.chosen(long) for kind in self.attention)
        return replace(self, attention=kinds, max_positions=self.max_positions if long else short)


@dataclass(frozen=True)
class Family:
    """One architecture. Module names are those of Hugging Face; {} in `layer` stands for the layer's index.

    name: the name of the family. model_types, architectures: its values of these keys in config.json.
    linears: the name of each linear within a layer, by role, in order; {} stands for the expert's index. Linears in one
        matrix on disk share its name, and their rows follow one another in the order of the roles.
    interleaved: the names of matrices whose rows are ordered by kv head instead: its queries, its key, its value.
    norms: the name of each norm within a layer, by role. "attention", "mlp": the norm of that branch's input (without
        one the branch reads the other's input if the branches are parallel, or else the hidden states);
        "attention_output", "mlp_output": the norm of the branch's output; "attention_residual", "mlp_residual": the
        norm behind the sum with the residual; "query", "key": the norm of every head; "queries", "keys": the norm of
        all heads at once.
    groups: the smoothing groups by role, norm groups first.
    geometry: a function that reads the numbers from a config.json.
    norm: "rms"; "rms+1", stored as weight - 1; or "layer", with a bias.
    parallel: whether both branches read the same hidden states.
    alibi: its linear biases; None without. positions: the name of the table of learned positions; `position_offset` is
        the row of position 0. embedding_norm, final_norm, project_in, project_out: names of modules; None without
        (project_in: embedding -> hidden, project_out: hidden -> head).
    base: the first part of all names but lm_head's. Checkpoints that were saved without the head lack it.
    packed: other forms on disk: for the name of a tensor within a layer the roles of the weights in it, whose rows
        follow one another. For roles of experts the first dimension counts the experts.
    variant: a function from a config.json to the record of its layout, if the architecture has several.
    modern: a function from a config.json of an old release, with a model type that transformers does not know, to the
        same config.json under today's names.
    ignored_keys: the keys of config.json that its models do not use, whatever their value.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    embedding: str
    layer: str
    final_norm: str | None
    lm_head: str
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    groups: tuple[SmoothingGroup, ...]
    geometry: Callable[[Config], Geometry]
    norm: str = "rms"
    interleaved: tuple[str, ...] = ()
    parallel: bool = False
    alibi: Alibi | None = None
    positions: str | None = None
    position_offset: int = 0
    embedding_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    base: str = "model."
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    variant: Callable[[Config], Family] | None = None
    modern: Callable[[Mapping], dict] | None = None
    ignored_keys: tuple[str, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether the MLP computes act(gate) * up instead of act(up)."""
        return "gate" in self.linears

    def roles(self, geometry: Geometry) -> tuple[str, ...]:
        """The roles of all linears of a layer, with the router and every expert's linears."""
        shared = tuple(Role(kind) for kind, name in self.linears.items() if "{}" not in name)
        each = tuple(kind for kind, name in self.linears.items() if "{}" in name)
        return shared + tuple(Role(kind, expert) for expert in range(geometry.experts) for kind in each)

    def expanded(self, geometry: Geometry) -> tuple[SmoothingGroup, ...]:
        """The smoothing groups with every expert's linears spelled out."""
        found: list[SmoothingGroup] = []
        for group in self.groups:
            if "{}" in self.linears.get(group.source, ""):  # within each expert
                found += [
                    SmoothingGroup(Role(group.source, n), tuple(Role(kind, n) for kind in group.linears), group.through)
                    for n in range(geometry.experts)
                ]
            else:
                shared = tuple(role for role in group.linears if "{}" not in self.linears[role])
                each = [role for role in group.linears if role not in shared]
                experts = tuple(Role(kind, n) for n in range(geometry.experts) for kind in each)
                found.append(SmoothingGroup(group.source, shared + experts, group.through))
        return tuple(found)

    def linear(self, role: str) -> str:
        """The name of a linear within a layer: linear("up.3") is "block_sparse_moe.experts.3.w3"."""
        found = parsed(role)
        return self.linears[found.kind].format(found.expert)

    def shape(self, role: str, geometry: Geometry) -> tuple[int, int]:
        """The shape of a linear, (out, in)."""
        hidden, inner = geometry.hidden_size, geometry.intermediate_size
        return {
            "q": (geometry.query_size, hidden),
            "k": (geometry.kv_size, hidden),
            "v": (geometry.kv_size, hidden),
            "o": (hidden, geometry.query_size),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
            ROUTER: (geometry.experts, hidden),
        }[parsed(role).kind]

    def has_bias(self, role: str, geometry: Geometry) -> bool:
        """Whether a linear carries a bias."""
        return parsed(role).kind in geometry.biased

    def norm_size(self, role: str, geometry: Geometry) -> int:
        """The number of channels of a layer's norm."""
        head, queries, keys = geometry.head_dim, geometry.query_size, geometry.kv_size
        sizes = {"query": head, "key": head, "queries": queries, "keys": keys}
        return sizes.get(role, geometry.hidden_size)

    def module(self, layer: int, name: str) -> str:
        """The full module name of a part of a layer: module(3, "mlp.up_proj") is "model.layers.3.mlp.up_proj"."""
        return f"{self.layer.format(layer)}.{name}"

    def stored(self, geometry: Geometry) -> dict[str, tuple[str, ...]]:
        """The matrices of a layer on disk: for each name within the layer the roles of the linears in it."""
        found: dict[str, tuple[str, ...]] = {}
        for role in self.roles(geometry):
            name = self.linear(role)
            found[name] = (*found.get(name, ()), role)
        return found

    def tensors(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a checkpoint with these numbers, by name, in order."""
        hidden, embedded, vocabulary = geometry.hidden_size, geometry.embedded_size, geometry.vocab_size
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (vocabulary, embedded)}
        if self.positions:
            shapes[f"{self.positions}.weight"] = (geometry.max_positions + self.position_offset, hidden)
        if self.project_in:
            shapes[f"{self.project_in}.weight"] = (hidden, embedded)
        if self.embedding_norm:
            self._add_norm(shapes, self.embedding_norm, hidden)
        stored = self.stored(geometry)
        for layer in range(geometry.layers):
            for role, name in self.norms.items():
                self._add_norm(shapes, self.module(layer, name), self.norm_size(role, geometry))
            for name, roles in stored.items():
                rows = sum(self.shape(role, geometry)[0] for role in roles)
                shapes[f"{self.module(layer, name)}.weight"] = (rows, self.shape(roles[0], geometry)[1])
                if self.has_bias(roles[0], geometry):
                    shapes[f"{self.module(layer, name)}.bias"] = (rows,)
        if self.final_norm:
            self._add_norm(shapes, self.final_norm, hidden)
        if self.project_out:
            shapes[f"{self.project_out}.weight"] = (embedded, hidden)
        if not geometry.tied_embeddings:
            shapes[f"{self.lm_head}.weight"] = (vocabulary, embedded)
        return shapes

    def _add_norm(self, shapes: dict[str, tuple[int, ...]], name: str, size: int) -> None:
        shapes[f"{name}.weight"] = (size,)
        if self.norm == "layer":
            shapes[f"{name}.bias"] = (size,)
