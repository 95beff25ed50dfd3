"""BLOOM: ALiBi, a norm behind the embedding, q, k and v of each head side by side in one matrix, GELU (tanh)."""

from __future__ import annotations

from recipes.recipe import PAPER, Recipe
from smoothquant.config import Config
from smoothquant.errors import CheckpointError
from smoothquant.family import Alibi, Attention, Family, Geometry, SmoothingGroup


def geometry(config: Config) -> Geometry:
    """Numbers of a BLOOM from its config.json (n_layer and n_head, or the names that other families use)."""
    if config.get("apply_residual_connection_post_layernorm"):
        raise CheckpointError(
            "config.json: apply_residual_connection_post_layernorm is true: the norms feed the residual, too",
            expected="false, as in every published BLOOM: else 1/s cannot be folded into the norms",
        )
    heads, layers = (config.get(short) or config[long] for short, long in NAMES)
    hidden = config.get("hidden_size") or config["n_embed"]
    return Geometry(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=config["vocab_size"],
        max_positions=config.get("seq_length", 2048),
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        activation="gelu_pytorch_tanh",
        attention=(Attention(),) * layers,
        tied_embeddings=config.get("tie_word_embeddings", True),
        biased=frozenset(("q", "k", "v", "o", "up", "down")),
    )


NAMES = (("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers"))
QKV = "self_attention.query_key_value"
FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    architectures=("BloomForCausalLM", "BloomModel"),
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    layer="transformer.h.{}",
    final_norm="transformer.ln_f",
    lm_head="lm_head",
    base="transformer.",
    linears={
        **dict.fromkeys(("q", "k", "v"), QKV),
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    interleaved=(QKV,),
    norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    norm="layer",
    groups=(
        SmoothingGroup("attention", ("q", "k", "v")),
        SmoothingGroup("mlp", ("up",)),
        SmoothingGroup("v", ("o",), through="attention"),
    ),
    alibi=Alibi(),
    geometry=geometry,
)

SIZES = {size: f"bloom-{size}" for size in ("560m", "1b1", "1b7", "3b", "7b1")} | {"176b": "bloom"}
RECIPES = (
    Recipe("bloom", FAMILY, alpha=0.5, alpha_by=PAPER),
    *(Recipe(f"bloom-{size}", FAMILY, 0.5, f"bigscience/{hub}", alpha_by=PAPER) for size, hub in SIZES.items()),
)
