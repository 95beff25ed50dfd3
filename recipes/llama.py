"""Llama 1, 2, 3: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from recipes.recipe import PublishedPerplexity, Recipe
from smoothquant.config import Config
from smoothquant.family import Family, Geometry, SmoothingGroup
from smoothquant.rope import rotary


def geometry(config: Config, *, partial: bool = False) -> Geometry:
    """Numbers of a Llama, or of a model with its config keys, from its config.json (old and new spellings).

    partial: whether the family knows heads of which only a part of the channels is turned.
    """
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    attention = ("q", "k", "v", "o") if config.get("attention_bias") else ()
    mlp = ("gate", "up", "down") if config.get("mlp_bias") else ()
    return Geometry(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        activation=config.get("hidden_act", "silu"),
        attention=(rotary(config, head_dim, partial=partial),) * layers,
        tied_embeddings=config.get("tie_word_embeddings", False),
        biased=frozenset(attention + mlp),
    )


def windowed(numbers: Geometry, window: int | None, sliding: Sequence[bool] | None = None) -> Geometry:
    """The same numbers with a sliding window in the layers for which `sliding` holds (default: all)."""
    kinds = numbers.attention
    return replace(
        numbers,
        attention=tuple(
            replace(kind, window=window) if sliding is None or sliding[layer] else kind
            for layer, kind in enumerate(kinds)
        ),
    )


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    embedding="model.embed_tokens",
    layer="model.layers.{}",
    final_norm="model.norm",
    lm_head="lm_head",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    groups=(
        SmoothingGroup("attention", ("q", "k", "v")),
        SmoothingGroup("mlp", ("gate", "up")),
        SmoothingGroup("v", ("o",), through="attention"),
        SmoothingGroup("up", ("down",), through="product"),
    ),
    geometry=geometry,
)

# Alphas and WikiText-2 perplexities: the table in the README of https://github.com/mit-han-lab/smoothquant (commit
# c61476d). Those runs also quantized the outputs of q, k and v.
RECIPES = (
    Recipe("llama", FAMILY, alpha=0.85),
    *(Recipe(f"llama-{size}", FAMILY, 0.85, f"huggyllama/llama-{size}") for size in ("7b", "13b", "30b", "65b")),
    Recipe("llama-2-7b", FAMILY, 0.85, "meta-llama/Llama-2-7b-hf", published=PublishedPerplexity(5.474, 5.515)),
    Recipe("llama-2-13b", FAMILY, 0.85, "meta-llama/Llama-2-13b-hf", published=PublishedPerplexity(4.950, 4.929)),
    Recipe("llama-2-70b", FAMILY, 0.9, "meta-llama/Llama-2-70b-hf", published=PublishedPerplexity(3.320, 3.359)),
    Recipe("llama-3-8b", FAMILY, 0.85, "meta-llama/Meta-Llama-3-8B", published=PublishedPerplexity(6.138, 6.258)),
    Recipe("llama-3-70b", FAMILY, 0.85, "meta-llama/Meta-Llama-3-70B", published=PublishedPerplexity(2.857, 2.982)),
    *(
        Recipe(f"llama-3.1-{size.lower()}", FAMILY, 0.85, f"meta-llama/Llama-3.1-{size}")
        for size in ("8B", "70B", "405B")
    ),
    *(Recipe(f"llama-3.2-{size.lower()}", FAMILY, 0.85, f"meta-llama/Llama-3.2-{size}") for size in ("1B", "3B")),
    Recipe("tiny-llama", FAMILY, alpha=0.7, alpha_by="measured on the bundled model", samples=64, length=256),
)
