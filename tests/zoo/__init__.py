"""Tiny random models of every layout that published checkpoints have, as data: one row per layout.

`save("falcon-40b", folder)` writes one as its authors would publish it today (safetensors, config of transformers 5,
tokenizer); `tests.zoo.forms` rewrites it into what is, or was, on the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    BloomForCausalLM,
    FalconForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Olmo2ForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from tests.models import OUTLIER, VOCABULARY, save_tokenizer

WINDOW = 6  # of the layouts with sliding windows: shorter than any test's sequence
STD = 0.1  # of every weight matrix and bias

COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
POSITIONS = {"max_position_embeddings": 512}
GATED = {"intermediate_size": 128, "num_key_value_heads": 2} | POSITIONS
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {  # beyond its original context within a test's sequence
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 16,
    "original_max_position_embeddings": 16,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.7,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.5,
}
GLOBAL_AND_LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SLIDING, FULL = "sliding_attention", "full_attention"

QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
MOE = ("mlp.gate.weight", "mlp.experts.gate_up_proj")
FUSED_QKV = ("self_attention.query_key_value.weight",)
MLP = ("mlp.dense_h_to_4h.weight",)

PRE_NORM = {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}
FOUR_NORMS = {"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP}
SEQUENTIAL_FUSED = {"input_layernorm": FUSED_QKV, "post_attention_layernorm": MLP}


@dataclass(frozen=True)
class Layout:
    """One layout of checkpoint.

    numbers: of its config, beyond COMMON.
    consumers: norm -> the parameters that read its output and nothing else does; names within a layer, in memory.
        None where a norm feeds the residual too: there are no outlier channels then.
    layers: name of the list of layers.
    gain_offset: what the norms add to their stored weight.
    length: of the longest sequence that is wanted, where the layout's RoPE goes by it.
    """

    model: type[PreTrainedModel]
    numbers: Mapping[str, object] = field(default_factory=dict)
    consumers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PRE_NORM)
    layers: str = "model.layers"
    gain_offset: float = 0.0
    length: int | None = None


def _falcon(consumers: Mapping[str, tuple[str, ...]], **numbers: object) -> Layout:
    return Layout(FalconForCausalLM, POSITIONS | numbers, consumers, "transformer.h")


def _falcon_rw(**numbers: object) -> Layout:
    return _falcon(SEQUENTIAL_FUSED, alibi=True, multi_query=False, parallel_attn=False, bias=True, **numbers)


def _bloom(**numbers: object) -> Layout:
    return Layout(BloomForCausalLM, numbers, SEQUENTIAL_FUSED, "transformer.h")


def _opt(consumers: Mapping[str, tuple[str, ...]], **numbers: object) -> Layout:
    numbers = {"ffn_dim": 128, "max_position_embeddings": 128, "dropout": 0.0} | numbers
    return Layout(OPTForCausalLM, numbers, consumers, "model.decoder.layers")


def _phi3(length: int | None = None, **numbers: object) -> Layout:
    fused = {
        "input_layernorm": ("self_attn.qkv_proj.weight",),
        "post_attention_layernorm": ("mlp.gate_up_proj.weight",),
    }
    return Layout(Phi3ForCausalLM, GATED | numbers, fused, length=length)


def _longrope(original: int, length: int | None = None) -> Layout:
    """original: tokens up to which the short factors hold."""
    factors = {"short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [1.0 + 3 * n for n in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, "original_max_position_embeddings": original}
    return _phi3(length, rope_parameters=rope, original_max_position_embeddings=original)


def _mixtral(**numbers: object) -> Layout:
    consumers = {"input_layernorm": QKV, "post_attention_layernorm": MOE}
    return Layout(MixtralForCausalLM, GATED | {"num_local_experts": 4, "num_experts_per_tok": 2} | numbers, consumers)


def _qwen3_moe(**numbers: object) -> Layout:
    consumers = {"input_layernorm": QKV, "post_attention_layernorm": MOE}
    return Layout(Qwen3MoeForCausalLM, GATED | {"head_dim": 24, "moe_intermediate_size": 48} | numbers, consumers)


def _gemma(model: type[PreTrainedModel], **numbers: object) -> Layout:
    """head_dim is not hidden / heads, and the attention scale is neither's."""
    scaled = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
    return Layout(model, GATED | scaled | numbers, FOUR_NORMS, gain_offset=1.0)


ZOO: Mapping[str, Layout] = {
    "llama": Layout(LlamaForCausalLM, GATED | {"head_dim": 16}),
    "llama-tied": Layout(LlamaForCausalLM, GATED | {"tie_word_embeddings": True}),
    "llama-biased": Layout(LlamaForCausalLM, GATED | {"attention_bias": True, "mlp_bias": True}),
    "llama-scaled": Layout(LlamaForCausalLM, GATED | {"rope_parameters": LLAMA3}),
    "mistral": Layout(MistralForCausalLM, GATED | {"sliding_window": WINDOW}),
    "mistral-nemo": Layout(MistralForCausalLM, GATED | {"sliding_window": None, "head_dim": 24}),
    "mixtral": _mixtral(sliding_window=None),
    "mixtral-sliding": _mixtral(sliding_window=WINDOW),
    "falcon-7b": _falcon({"input_layernorm": FUSED_QKV + MLP}, multi_query=True, parallel_attn=True),
    "falcon-40b": _falcon({"ln_attn": FUSED_QKV, "ln_mlp": MLP}, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": _falcon(
        {"input_layernorm": FUSED_QKV + MLP},
        new_decoder_architecture=True,
        num_ln_in_parallel_attn=1,
        num_kv_heads=2,
        ffn_hidden_size=192,
        tie_word_embeddings=False,
    ),
    "falcon-rw": _falcon_rw(),
    "falcon-rw-16-heads": _falcon_rw(num_attention_heads=16),  # slopes that bfloat16, in which they are, must round
    "opt": _opt({"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1.weight",)}),
    "opt-350m": _opt({}, do_layer_norm_before=False, word_embed_proj_dim=48),
    "bloom": _bloom(),
    "bloom-6-heads": _bloom(hidden_size=96, num_attention_heads=6),
    "qwen2": Layout(Qwen2ForCausalLM, GATED),
    "qwen2-sliding": Layout(
        Qwen2ForCausalLM, GATED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Layout(Qwen3ForCausalLM, GATED | {"head_dim": 24}),
    "qwen3-tied": Layout(Qwen3ForCausalLM, GATED | {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-yarn": Layout(Qwen3ForCausalLM, GATED | {"head_dim": 24, "rope_parameters": YARN}),
    "qwen3-moe": _qwen3_moe(num_hidden_layers=1, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True),
    "qwen3-moe-unnormed": _qwen3_moe(num_experts=16, num_experts_per_tok=4, norm_topk_prob=False),
    "phi3": _phi3(sliding_window=None),
    "phi3-sliding": _phi3(sliding_window=WINDOW),
    "phi3-partial": _phi3(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
    "phi3-longrope": _longrope(256),
    "phi3-longrope-long": _longrope(4, length=512),
    "gemma2": _gemma(Gemma2ForCausalLM, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma3": _gemma(
        Gemma3ForCausalLM,
        num_hidden_layers=3,
        layer_types=[SLIDING, SLIDING, FULL],
        rope_parameters=GLOBAL_AND_LOCAL,
    ),
    "granite": Layout(GraniteForCausalLM, GATED | MULTIPLIERS | {"tie_word_embeddings": True}),
    "olmo2": Layout(Olmo2ForCausalLM, GATED, {}),
}


def build(name: str, *, seed: int = 0, outlier: float = OUTLIER, **config_changes: object) -> PreTrainedModel:
    """A random model of this layout, float32. outlier: how much larger every 17th channel of its norms is, at no change
    of the function."""
    layout = ZOO[name]
    config = layout.model.config_class(**(COMMON | dict(layout.numbers) | config_changes))
    model = layout.model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 or parameter_name.endswith("bias"):
                parameter.normal_(std=STD, generator=generator)
            else:
                parameter.uniform_(0.5 - layout.gain_offset, 1.5 - layout.gain_offset, generator=generator)
        for layer in model.get_submodule(layout.layers):
            for norm_name, consumers in layout.consumers.items():
                norm = layer.get_submodule(norm_name)
                norm.weight[3::17] = (norm.weight[3::17] + layout.gain_offset) * outlier - layout.gain_offset
                if getattr(norm, "bias", None) is not None:
                    norm.bias[3::17] *= outlier
                for consumer in consumers:
                    layer.get_parameter(consumer)[..., 3::17] /= outlier
    return model


def save(
    name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config_changes: object
) -> Path:
    """A random model of this layout on disk, with a tokenizer."""
    build(name, seed=seed, **config_changes).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
