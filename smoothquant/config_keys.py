"""The keys of config.json that families read: type and range of each, whatever the family.

The ranges hold every published model many times over, and keep a number that is out of all proportion from being used
for anything. What a value within them means is the family's business, and transformers says whether it is right
(`recipes.trust`).
"""

from __future__ import annotations

from collections.abc import Mapping

from smoothquant.values import FLAG, NAME, OBJECT, Expectation, listed, number, whole

LAYERS = whole(1, 4096)
SIZE = whole(1, 2**24)  # channels, or rows
FEW = whole(1, 2**16)  # heads, channels of a head, experts
POSITIONS = whole(1, 2**40)
FACTOR = number(0, 2**20, above=True)  # of a frequency or a length
MULTIPLIER = number(-(2**20), 2**20)
BASE = number(0, 1e18, above=True).or_null()

KEYS: Mapping[str, Expectation] = {
    # names
    "model_type": NAME.or_null(),
    "architectures": listed(NAME).or_null(),
    # sizes
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "vocab_size"), SIZE),
    **dict.fromkeys(("n_embed", "ffn_hidden_size", "word_embed_proj_dim"), SIZE.or_null()),
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS.or_null(),
    **dict.fromkeys(("num_attention_heads", "decoder_sparse_step", "num_experts_per_tok"), FEW),
    **dict.fromkeys(("n_head", "num_key_value_heads", "num_kv_heads", "head_dim"), FEW.or_null()),
    **dict.fromkeys(("num_local_experts", "num_experts"), FEW.or_null()),
    "num_ln_in_parallel_attn": whole(0, 2).or_null(),
    "mlp_only_layers": listed(whole(0, 4096)).or_null(),
    # positions
    **dict.fromkeys(("max_position_embeddings", "seq_length"), POSITIONS),
    **dict.fromkeys(("original_max_position_embeddings", "sliding_window"), POSITIONS.or_null()),
    "max_window_layers": whole(0, 2**16),
    "sliding_window_pattern": FEW,
    "layer_types": listed(NAME).or_null(),
    # rotary embeddings
    **dict.fromkeys(("rope_scaling", "rope_parameters", "full_attention", "sliding_attention"), OBJECT.or_null()),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), BASE),
    **dict.fromkeys(("rope_type", "type"), NAME.or_null()),
    "partial_rotary_factor": number(0, 1, above=True).or_null(),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), FACTOR),
    **dict.fromkeys(("factor", "beta_fast", "beta_slow", "attention_factor"), FACTOR.or_null()),
    **dict.fromkeys(("mscale", "mscale_all_dim"), MULTIPLIER.or_null()),
    **dict.fromkeys(("short_factor", "long_factor"), listed(FACTOR).or_null()),
    "truncate": FLAG,
    # arithmetic
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon"), number(0, 1)),
    **dict.fromkeys(("hidden_act", "activation_function"), NAME),
    **dict.fromkeys(("hidden_activation", "activation"), NAME.or_null()),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), number(0, 2**20).or_null()),
    "query_pre_attn_scalar": FACTOR,
    **dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier"), MULTIPLIER),
    "logits_scaling": FACTOR,
    # what there is
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "enable_bias", "norm_topk_prob"), FLAG),
    **dict.fromkeys(("layer_norm_elementwise_affine", "do_layer_norm_before", "_remove_final_layer_norm"), FLAG),
    **dict.fromkeys(("use_sliding_window", "apply_residual_connection_post_layernorm"), FLAG),
    **dict.fromkeys(("new_decoder_architecture", "multi_query", "parallel_attn", "bias", "alibi"), FLAG.or_null()),
    "use_bidirectional_attention": FLAG.or_null(),
}
