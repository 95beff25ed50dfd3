"""Falcon: attention and MLP in parallel, in three layouts, and the older sequential one.

    7B         one norm feeds both branches: one scale for q, k, v and the MLP; one kv head
    40B, 180B  a norm for each branch; grouped kv heads
    11B        grouped kv heads, one norm for both branches
    RW         sequential, ALiBi, biases, as many kv heads as heads

RW is laid out as BLOOM is, but for BLOOM's norm behind the embedding, and so are the parts of all of them named.
q, k, v lie in one matrix, ordered by kv head: its queries, its key, its value. GELU: nothing is folded through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from recipes import bloom
from recipes.recipe import PublishedPerplexity, Recipe
from smoothquant.config import Config
from smoothquant.family import Alibi, Attention, Family, Geometry, SmoothingGroup
from smoothquant.rope import rotary


def modern(config: Mapping) -> dict:
    """A config.json of the first releases (model types RefinedWeb and RefinedWebModel) under today's names.

    Source: transformers 4.33, models/falcon/convert_custom_code_checkpoint.py. The first release of 40B says that it
    has the new decoder by naming its kv heads.
    """
    found = {RENAMED.get(key, key): value for key, value in config.items()}
    if "n_head_kv" in config:
        found.setdefault("new_decoder_architecture", True)
    if config.get("model_type") in OLD_TYPES:
        found["model_type"] = "falcon"
    return found


def _new(config: Config) -> bool:
    """The decoder of 40B and its successors."""
    return bool(config.get("new_decoder_architecture"))


def geometry(config: Config) -> Geometry:
    """Numbers of a Falcon from its config.json."""
    heads, layers, hidden = config["num_attention_heads"], config["num_hidden_layers"], config["hidden_size"]
    shared = heads if _new(config) or not config.get("multi_query", True) else 1
    kv_heads = (config.get("num_kv_heads") if _new(config) else None) or shared
    kind = Attention() if config.get("alibi") else rotary(config, hidden // heads)
    return Geometry(
        hidden_size=hidden,
        intermediate_size=config.get("ffn_hidden_size") or 4 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        activation=config.get("activation") or "gelu",
        attention=(kind,) * layers,
        tied_embeddings=config.get("tie_word_embeddings", True),
        biased=frozenset(("q", "k", "v", "o", "up", "down") if config.get("bias") else ()),
    )


def variant(config: Config) -> Family:
    """The record for a config.json."""
    parallel = _new(config) or config.get("parallel_attn", True)
    norms = config.get("num_ln_in_parallel_attn") or (2 if _new(config) else 1)
    record = SEQUENTIAL if not parallel else TWO_NORMS if _new(config) and norms == 2 else ONE_NORM
    return replace(record, alibi=ALIBI if config.get("alibi") else None)


OLD_TYPES = ("RefinedWeb", "RefinedWebModel")
RENAMED = {
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}
ALIBI = Alibi(scaled=True, dtype=torch.bfloat16)
SEQUENTIAL: Family = replace(
    bloom.FAMILY,
    name="falcon",
    model_types=("falcon", *OLD_TYPES),
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    embedding_norm=None,
    alibi=None,
    geometry=geometry,
)
TWO_NORMS = replace(SEQUENTIAL, parallel=True, norms={"attention": "ln_attn", "mlp": "ln_mlp"})
ONE_NORM = replace(
    SEQUENTIAL,
    parallel=True,
    norms={"attention": "input_layernorm"},
    groups=(
        SmoothingGroup("attention", ("q", "k", "v", "up")),
        SmoothingGroup("v", ("o",), through="attention"),
    ),
)
FAMILY = replace(SEQUENTIAL, variant=variant, modern=modern)

RECIPES = (
    Recipe("falcon", FAMILY, alpha=0.6),
    Recipe("falcon-rw-1b", FAMILY, 0.6, "tiiuae/falcon-rw-1b"),
    Recipe("falcon-7b", FAMILY, 0.6, "tiiuae/falcon-7b", published=PublishedPerplexity(6.590, 6.629)),
    Recipe("falcon-11b", FAMILY, 0.6, "tiiuae/falcon-11B"),
    Recipe("falcon-40b", FAMILY, 0.7, "tiiuae/falcon-40b", published=PublishedPerplexity(5.228, 5.255)),
    Recipe("falcon-180b", FAMILY, 0.7, "tiiuae/falcon-180B"),
)
