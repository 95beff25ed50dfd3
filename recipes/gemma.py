"""Gemma 2 and 3: four norms whose weight is stored as w - 1, windows in some layers, a scaled embedding.

The norms behind the branches stand between down (or o) and the residual: nothing more to fold there. Gemma 2 caps
scores and logits; Gemma 3 norms every query and key head and has rotary frequencies of its own in windowed layers.
"""

from __future__ import annotations

import math
from collections import ChainMap
from dataclasses import replace
from typing import Any

from recipes import llama
from recipes.recipe import Recipe
from smoothquant.config import Config
from smoothquant.errors import CheckpointError
from smoothquant.family import Family, Geometry
from smoothquant.rope import ROPE_KEYS, rotary

DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}


def _geometry(config: Config, pattern: int) -> Geometry:
    """pattern: every so many layers one has no window, where `layer_types` does not say."""
    if config.get("use_bidirectional_attention"):
        raise CheckpointError(
            "config.json: use_bidirectional_attention is true: this model embeds texts",
            expected="a decoder, which sees what came before",
        )
    numbers = llama.geometry(config.defaulting(DEFAULTS).replacing({"hidden_act": None}))
    layers = range(numbers.layers)
    kinds = config.get("layer_types") or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in layers
    ]
    numbers = replace(
        numbers,
        activation=config.get("hidden_activation") or "gelu_pytorch_tanh",  # whatever hidden_act says
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping") or 0.0,
        logits_softcap=config.get("final_logit_softcapping") or 0.0,
        embedding_scale=math.sqrt(numbers.hidden_size),
    )
    sliding = [kind == "sliding_attention" for kind in kinds]
    return llama.windowed(numbers, config.get("sliding_window", 4096), sliding)


def geometry2(config: Config) -> Geometry:
    """Numbers of a Gemma 2 from its config.json."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192}
    return _geometry(config.defaulting(caps), pattern=2)


class Shadowing(ChainMap):
    """Mappings of which the first that has a key goes before the others, which are read all the same."""

    def __getitem__(self, key: str) -> Any:
        found = [each[key] for each in self.maps if key in each]
        return found[0] if found else self.__missing__(key)


def geometry3(config: Config) -> Geometry:
    """Numbers of a Gemma 3 (text) from its config.json; one rotary embedding for windowed layers, one for the others.

    New spelling: rope_parameters {"full_attention": {...}, "sliding_attention": {...}}; old: rope_theta,
    and rope_local_base_freq. In both, the numbers of rope_scaling go before those of "full_attention".
    """
    config = config.defaulting({"max_position_embeddings": 131072})
    own = dict.fromkeys((*ROPE_KEYS, "attn_logit_softcapping"))
    numbers = _geometry(config.replacing(own), config.get("sliding_window_pattern", 6))
    named, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    positions = {"max_position_embeddings": numbers.max_positions}
    everywhere = {
        "rope_parameters": Shadowing(scaling, named.get("full_attention") or {"rope_type": "default"}),
        "rope_theta": config.get("rope_theta"),
    }
    nearby = {
        "rope_parameters": named.get("sliding_attention"),
        "rope_theta": config.get("rope_local_base_freq"),
    }
    full = rotary(positions | everywhere, numbers.head_dim, 1e6)
    sliding = rotary(positions | nearby, numbers.head_dim, 10000.0)
    kinds = (full if kind.window is None else replace(sliding, window=kind.window) for kind in numbers.attention)
    return replace(numbers, attention=tuple(kinds))


NORMS = {
    "attention": "input_layernorm",
    "attention_output": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "mlp_output": "post_feedforward_layernorm",
}
GEMMA2: Family = replace(
    llama.FAMILY,
    name="gemma2",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    norms=NORMS,
    norm="rms+1",
    geometry=geometry2,
)
GEMMA3: Family = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM",),
    ignored_keys=("attn_logit_softcapping",),  # which Gemma 3 may name and does not have
    norms={**NORMS, "query": "self_attn.q_norm", "key": "self_attn.k_norm"},
    geometry=geometry3,
)

RECIPES = (
    Recipe("gemma2", GEMMA2, alpha=0.8),
    *(Recipe(f"gemma-2-{size}", GEMMA2, 0.8, f"google/gemma-2-{size}") for size in ("2b", "9b", "27b")),
    Recipe("gemma3", GEMMA3, alpha=0.8),
    Recipe("gemma-3-1b", GEMMA3, 0.8, "google/gemma-3-1b-pt"),
)
