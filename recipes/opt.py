"""OPT: layer norms, learned positions from row 2 on, biases, ReLU.

ReLU is positively homogeneous, so fc1 -> fc2 folds, too. OPT-350m norms *after* each residual: what q, k, v and fc1
read is the residual itself, so that nothing can be folded before them, and only v -> o and fc1 -> fc2 are smoothed. It
also projects its narrow embedding in and out.
"""

from __future__ import annotations

from dataclasses import replace

from recipes.recipe import PAPER, Recipe
from smoothquant.config import Config
from smoothquant.errors import CheckpointError
from smoothquant.family import Attention, Family, Geometry, SmoothingGroup


def geometry(config: Config) -> Geometry:
    """Numbers of an OPT from its config.json."""
    heads, layers, hidden = config["num_attention_heads"], config["num_hidden_layers"], config["hidden_size"]
    if not config.get("layer_norm_elementwise_affine", True):
        raise CheckpointError(
            "config.json: layer_norm_elementwise_affine is false", expected="norms with weights, into which 1/s folds"
        )
    biased = ("q", "k", "v", "o", "up", "down") if config.get("enable_bias", True) else ()
    return Geometry(
        hidden_size=hidden,
        intermediate_size=config["ffn_dim"],
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        norm_epsilon=1e-5,
        activation=config.get("activation_function", "relu"),
        attention=(Attention(),) * layers,
        tied_embeddings=config.get("tie_word_embeddings", True),
        biased=frozenset(biased),
        embedding_size=config.get("word_embed_proj_dim") or hidden,
    )


def variant(config: Config) -> Family:
    """The record for a config.json: norms before or after the residual, with projections or without, ReLU or not."""
    before = config.get("do_layer_norm_before", True)
    projected = (config.get("word_embed_proj_dim") or config["hidden_size"]) != config["hidden_size"]
    homogeneous = config.get("activation_function", "relu") == "relu"
    groups = tuple(
        group
        for group in FAMILY.groups
        if (before or group.through != "norm") and (homogeneous or group.through != "product")
    )
    after = {"attention_residual": "self_attn_layer_norm", "mlp_residual": "final_layer_norm"}
    return replace(
        FAMILY,
        groups=groups,
        norms=FAMILY.norms if before else after,
        final_norm=FAMILY.final_norm if before and not config.get("_remove_final_layer_norm") else None,
        project_in="model.decoder.project_in" if projected else None,
        project_out="model.decoder.project_out" if projected else None,
        variant=None,
    )


FAMILY = Family(
    name="opt",
    model_types=("opt",),
    architectures=("OPTForCausalLM",),
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    position_offset=2,
    layer="model.decoder.layers.{}",
    final_norm="model.decoder.final_layer_norm",
    lm_head="lm_head",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    norms={"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"},
    norm="layer",
    groups=(
        SmoothingGroup("attention", ("q", "k", "v")),
        SmoothingGroup("mlp", ("up",)),
        SmoothingGroup("v", ("o",), through="attention"),
        SmoothingGroup("up", ("down",), through="product"),
    ),
    geometry=geometry,
    variant=variant,
)

SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
RECIPES = (
    Recipe("opt", FAMILY, alpha=0.5, alpha_by=PAPER),
    *(Recipe(f"opt-{size}", FAMILY, 0.5, f"facebook/opt-{size}", alpha_by=PAPER) for size in SIZES),
    Recipe("opt-175b", FAMILY, 0.5, "OPT-175B: weights from Meta, on request", alpha_by=PAPER),
)
