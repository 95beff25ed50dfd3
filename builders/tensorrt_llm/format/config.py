"""Parse config.json of a TensorRT-LLM checkpoint by the rules of its loader.

rank = pp_rank * tp_size + tp_rank. Layers are split evenly over the pipeline stages and counted from 0 on each stage.
Heads and intermediate channels are split over the tensor-parallel ranks. KV heads are split too, or repeated if there
are fewer of them than ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from builders.tensorrt_llm.format.architectures import ALGORITHMS, ARCHITECTURES, Algorithm, Architecture

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class CheckpointConfig:
    """The configuration of a checkpoint. The fields are sizes of the whole model; the methods give sizes of a rank.

    window: the newest tokens that a token attends to; None for all. config.json has no place for it: the manifest says.
    """

    name: str
    architecture: Architecture
    algorithm: Algorithm
    kv_cache: str | None
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    max_positions: int | None
    activation: str
    epsilon: float
    positions: str
    rotary_dim: int
    rotary_base: float
    rotary_scaling: Mapping | None
    score_divisor: float  # besides sqrt(head_size)
    tp: int
    pp: int
    parallel_embedding: bool
    embedding_dim: int  # the dimension that parallel_embedding splits: 0 vocabulary, 1 channels
    qkv_bias: bool
    dense_bias: bool
    mlp_bias: bool
    parallel: bool
    mlp_norm: bool
    window: int | None = None

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    @property
    def stage_layers(self) -> int:
        """The number of layers of a pipeline stage."""
        return self.layers // self.pp

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of a layer's norms."""
        names = ["input_layernorm"]
        if not self.parallel:
            names.append("post_layernorm")
        elif self.mlp_norm:
            names.append("mlp_layernorm")
        return tuple(names)

    @property
    def rank_heads(self) -> int:
        return self.heads // self.tp

    @property
    def rank_kv_heads(self) -> int:
        return math.ceil(self.kv_heads / self.tp)

    @property
    def rank_qkv(self) -> int:
        """The number of rows of qkv on a rank: those of its queries, keys and values."""
        return (self.rank_heads + 2 * self.rank_kv_heads) * self.head_size

    @property
    def rank_vocab(self) -> int:
        """The number of vocabulary rows on a rank if the vocabulary is split; it is padded to a multiple of tp."""
        return math.ceil(self.vocab_size / self.tp)


def parse(content: Mapping) -> CheckpointConfig:
    """The configuration in a JSON object, in which `rules.config_findings` has found no errors."""
    architecture = ARCHITECTURES[content["architecture"]]
    quantization, mapping = content.get("quantization") or {}, content.get("mapping") or {}
    hidden, heads = content["hidden_size"], content["num_attention_heads"]
    head_size = content.get("head_size") or hidden // heads
    parallel, mlp_norm = falcon_form(content)
    return CheckpointConfig(
        name=content["architecture"],
        architecture=architecture,
        algorithm=ALGORITHMS[quantization.get("quant_algo")],
        kv_cache=quantization.get("kv_cache_quant_algo"),
        dtype=content["dtype"],
        vocab_size=content["vocab_size"],
        hidden_size=hidden,
        intermediate_size=content.get("intermediate_size") or 4 * hidden,
        layers=content["num_hidden_layers"],
        heads=heads,
        kv_heads=content.get("num_key_value_heads") or heads,
        head_size=head_size,
        max_positions=content.get("max_position_embeddings"),
        activation=content.get("hidden_act") or "gelu",
        epsilon=content.get("norm_epsilon", 1e-5),
        positions=content.get("position_embedding_type") or architecture.positions[0],
        rotary_dim=content.get("rotary_embedding_dim") or int(head_size * content.get("rotary_pct", 1.0)),
        rotary_base=content.get("rotary_base") or 10000.0,
        rotary_scaling=content.get("rotary_scaling"),
        score_divisor=content.get("q_scaling") or 1.0,
        tp=mapping.get("tp_size", 1),
        pp=mapping.get("pp_size", 1),
        parallel_embedding=bool(content.get("use_parallel_embedding")),
        embedding_dim=content.get("embedding_sharding_dim", 0),
        qkv_bias=_flag(architecture.qkv_bias, content),
        dense_bias=_flag(architecture.dense_bias, content),
        mlp_bias=_flag(architecture.mlp_bias, content),
        parallel=architecture.parallel and parallel,
        mlp_norm=architecture.parallel and mlp_norm,
    )


def falcon_form(content: Mapping) -> tuple[bool, bool]:
    """Whether attention and MLP of a Falcon run in parallel, and whether the MLP then has a norm of its own.

    The new decoder architecture has two norms, unless config.json says one.
    """
    new = bool(content.get("new_decoder_architecture"))
    norms = content.get("num_ln_in_parallel_attn") or (2 if new else 1)
    parallel = new or bool(content.get("parallel_attention"))
    return parallel, parallel and norms == 2


def _flag(rule: bool | str, content: Mapping) -> bool:
    return bool(content.get(rule)) if isinstance(rule, str) else rule
