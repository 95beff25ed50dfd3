"""The tensors that the loader demands of a rank file: the name, shape and dtype of each, and how ranks share it.

    transformer.vocab_embedding, position_embedding, ln_embed        first pipeline stage
    transformer.layers.N.{input,post,mlp}_layernorm                  N counts from 0 on every stage
    transformer.layers.N.attention.{qkv,dense}, mlp.{fc,gate,proj}
    transformer.ln_f, lm_head                                        last pipeline stage

Column-parallel linears (qkv, fc, gate) are split by rows, with their biases and per-channel scales. Row-parallel
linears (dense, proj) are split by columns, with the factors of their input. All other tensors are the same on every
rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from builders.tensorrt_llm.format.config import CheckpointConfig

SCALE, DIVISOR, PLAIN = "scale", "divisor", "plain"  # values must be finite and > 0; finite and not 0; finite
LINEARS: Mapping[str, bool] = {  # name in a layer -> whether it is column-parallel
    "attention.qkv": True,
    "attention.dense": False,
    "mlp.fc": True,
    "mlp.gate": True,
    "mlp.proj": False,
}


@dataclass(frozen=True)
class Expected:
    """One tensor of a rank file.

    split: whether each rank has a part of its own, or all ranks of a stage have the same tensor. role: the demand on
    its values. optional: whether the loader does without it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    split: bool = False
    role: str = PLAIN
    optional: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape is right. A scalar without dimensions also fits a shape of ones."""
        return shape == self.shape or (shape == () and all(size == 1 for size in self.shape))


def linears(config: CheckpointConfig) -> tuple[str, ...]:
    """The names of a layer's linears."""
    return tuple(name for name in LINEARS if config.architecture.gated or name != "mlp.gate")


def expected(config: CheckpointConfig, rank: int) -> dict[str, Expected]:
    """The tensors of rank file `rank`, by name, in the order of computation."""
    stage = rank // config.tp
    found: dict[str, Expected] = {}
    if stage == 0:
        found.update(_embedding(config))
    for layer in range(config.stage_layers):
        found.update({f"transformer.layers.{layer}.{name}": tensor for name, tensor in layer_tensors(config)})
    if stage == config.pp - 1:
        found.update({f"transformer.ln_f.{part}": tensor for part, tensor in _norm(config, quantized=False)})
        found["lm_head.weight"] = Expected(
            (config.rank_vocab, config.hidden_size), _dtype(config), split=config.tp > 1, optional=_may_be_tied(config)
        )
    return found


def layer_tensors(config: CheckpointConfig) -> Iterator[tuple[str, Expected]]:
    """Yield (name within the layer, tensor) for each tensor of a layer."""
    quantized = config.algorithm.form == "plugin"
    for norm in config.norms:
        yield from ((f"{norm}.{part}", tensor) for part, tensor in _norm(config, quantized))
    for name in linears(config):
        yield from ((f"{name}.{part}", tensor) for part, tensor in _linear(config, name))
    scalar = Expected((1,), torch.float32, role=SCALE)
    if config.algorithm.static:
        yield "attention.quantization_scaling_factor", scalar
        yield "mlp.quantization_scaling_factor", scalar
    if config.kv_cache is not None:
        yield "attention.kv_cache_scaling_factor", scalar
        yield "attention.kv_cache_rcp_scaling_factor", replace(scalar, optional=True)  # the loader derives it


def _embedding(config: CheckpointConfig) -> Iterator[tuple[str, Expected]]:
    rows, channels, split = config.vocab_size, config.hidden_size, config.parallel_embedding and config.tp > 1
    if split:
        rows = config.rank_vocab if config.embedding_dim == 0 else rows
        channels = channels // config.tp if config.embedding_dim == 1 else channels
    yield "transformer.vocab_embedding.weight", Expected((rows, channels), _dtype(config), split)
    if config.positions == "learned_absolute":
        shape = (config.max_positions or 0, config.hidden_size)
        yield "transformer.position_embedding.weight", Expected(shape, _dtype(config))
    if config.architecture.embedding_norm:
        for part, tensor in _norm(config, quantized=False):
            yield f"transformer.ln_embed.{part}", tensor


def _norm(config: CheckpointConfig, quantized: bool) -> Iterator[tuple[str, Expected]]:
    channels = Expected((config.hidden_size,), _dtype(config))
    yield "weight", channels
    if config.architecture.norm == "layer":
        yield "bias", channels
    if quantized:
        yield "scale_to_int", Expected((1,), torch.float32, role=SCALE)


def _linear(config: CheckpointConfig, name: str) -> Iterator[tuple[str, Expected]]:
    column, algorithm = LINEARS[name], config.algorithm
    rows, columns = sizes(config, name)
    own = config.tp > 1  # rank files differ
    weight_dtype = _dtype(config) if algorithm.form == "float" else torch.int8
    yield "weight", Expected((rows, columns), weight_dtype, split=own)
    if algorithm.form == "plugin":
        vector = algorithm.per_channel or name == "attention.qkv"  # q, k and v have scales of their own
        scales = (1, rows) if vector else (1, 1)
        yield "per_channel_scale", Expected(scales, torch.float32, split=own and column and vector, role=SCALE)
        if algorithm.static:
            yield "act_scale", Expected((1, 1), torch.float32, role=SCALE)
        if not column:
            yield "smoother", Expected((1, columns), torch.float32, split=own, role=DIVISOR)
    if algorithm.form == "qdq":
        yield "weights_scaling_factor", Expected((rows,), torch.float32, split=own and column, role=SCALE)
        yield "activation_scaling_factor", Expected((1,), torch.float32, role=SCALE)
        yield "prequant_scaling_factor", Expected((columns,), _dtype(config), split=own and not column, role=DIVISOR)
    if biased(config, name):
        yield "bias", Expected((rows,), _dtype(config), split=own and column)


def sizes(config: CheckpointConfig, name: str) -> tuple[int, int]:
    """The number of rows and of columns of a linear on a rank."""
    attention, intermediate = config.rank_heads * config.head_size, config.intermediate_size // config.tp
    return {
        "attention.qkv": (config.rank_qkv, config.hidden_size),
        "attention.dense": (config.hidden_size, attention),
        "mlp.fc": (intermediate, config.hidden_size),
        "mlp.gate": (intermediate, config.hidden_size),
        "mlp.proj": (config.hidden_size, intermediate),
    }[name]


def biased(config: CheckpointConfig, name: str) -> bool:
    """Whether a linear has a bias."""
    return {"attention.qkv": config.qkv_bias, "attention.dense": config.dense_bias}.get(name, config.mlp_bias)


def _may_be_tied(config: CheckpointConfig) -> bool:
    """Whether the loader can take lm_head from the embedding: both lie on one rank and have one shape."""
    alike = config.tp == 1 or (config.parallel_embedding and config.embedding_dim == 0)
    return config.pp == 1 and alike


def _dtype(config: CheckpointConfig) -> torch.dtype:
    return getattr(torch, config.dtype)
