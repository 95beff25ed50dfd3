"""Where a Hugging Face model keeps what a TensorRT-LLM checkpoint holds, and what its config.json says: for tests, from
the format's description, and nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Names:
    """Hugging Face's names. norms: TensorRT-LLM's name -> theirs. qkv: three linears, or a fused one."""

    layers: str
    qkv: tuple[str, ...]
    dense: str
    fc: str
    proj: str
    norms: Mapping[str, str]
    embedding: str
    ln_f: str
    gate: str | None = None
    positions: str | None = None
    ln_embed: str | None = None
    transposed: bool = False  # GPT-2's weights are (in, out)


_SELF = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = {"fc": "mlp.gate_proj", "gate": "mlp.up_proj", "proj": "mlp.down_proj"}
LLAMA = Names(
    "model.layers",
    _SELF,
    "self_attn.o_proj",
    norms={"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"},
    embedding="model.embed_tokens",
    ln_f="model.norm",
    **_GATED,
)
OPT = Names(
    "model.decoder.layers",
    _SELF,
    "self_attn.out_proj",
    "fc1",
    "fc2",
    {"input_layernorm": "self_attn_layer_norm", "post_layernorm": "final_layer_norm"},
    "model.decoder.embed_tokens",
    "model.decoder.final_layer_norm",
    positions="model.decoder.embed_positions",
)
BLOOM = Names(
    "transformer.h",
    ("self_attention.query_key_value",),
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"},
    "transformer.word_embeddings",
    "transformer.ln_f",
    ln_embed="transformer.word_embeddings_layernorm",
)
GPT2 = Names(
    "transformer.h",
    ("attn.c_attn",),
    "attn.c_proj",
    "mlp.c_fc",
    "mlp.c_proj",
    {"input_layernorm": "ln_1", "post_layernorm": "ln_2"},
    "transformer.wte",
    "transformer.ln_f",
    positions="transformer.wpe",
    transposed=True,
)


def names_of(model: PreTrainedModel) -> Names:
    config, kind = model.config, model.config.model_type
    if kind in ("llama", "mistral", "qwen2"):
        return LLAMA
    if kind != "falcon":
        return {"opt": OPT, "bloom": BLOOM, "gpt2": GPT2}[kind]
    norms = {"input_layernorm": "input_layernorm"}
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1:
        norms = {"input_layernorm": "ln_attn", "mlp_layernorm": "ln_mlp"}
    elif not config.new_decoder_architecture and not config.parallel_attn:
        norms["post_layernorm"] = "post_attention_layernorm"
    numbers = {name: getattr(BLOOM, name) for name in ("layers", "qkv", "dense", "fc", "proj", "embedding", "ln_f")}
    return Names(**numbers, norms=norms)


def describe(model: PreTrainedModel) -> dict:
    """config.json, but for dtype, mapping and quantization."""
    config, kind = model.config, model.config.model_type
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    common = {
        "architecture": model.config.architectures[0] if model.config.architectures else type(model).__name__,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "head_size": head_size,
        "max_position_embeddings": getattr(config, "max_position_embeddings", 512),
    }
    if kind in ("llama", "mistral", "qwen2"):
        rope = config.rope_parameters
        return common | {
            "num_key_value_heads": config.num_key_value_heads,
            "intermediate_size": config.intermediate_size,
            "hidden_act": config.hidden_act,
            "norm_epsilon": config.rms_norm_eps,
            "position_embedding_type": "rope_gpt_neox",
            "rotary_base": rope["rope_theta"],
            "rotary_scaling": None if rope["rope_type"] == "default" else dict(rope),
            "attn_bias": kind == "qwen2" or getattr(config, "attention_bias", False),
            "mlp_bias": getattr(config, "mlp_bias", False),
        }
    if kind == "opt":
        return common | {
            "intermediate_size": config.ffn_dim,
            "hidden_act": config.activation_function,
            "position_embedding_type": "learned_absolute",
            "do_layer_norm_before": True,
        }
    if kind == "gpt2":
        return common | {"hidden_act": "gelu_new", "position_embedding_type": "learned_absolute"}
    if kind == "bloom":
        epsilon = config.layer_norm_epsilon
        return common | {"hidden_act": "gelu", "norm_epsilon": epsilon, "position_embedding_type": "alibi"}
    kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else None
    return common | {
        "num_key_value_heads": kv_heads or config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": "gelu",
        "norm_epsilon": config.layer_norm_epsilon,
        "position_embedding_type": "alibi_with_scale" if config.alibi else "rope_gpt_neox",
        "rotary_base": (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
        "bias": config.bias,
        "parallel_attention": config.parallel_attn,
        "new_decoder_architecture": config.new_decoder_architecture,
        "num_ln_in_parallel_attn": config.num_ln_in_parallel_attn,
    }


def fused_rows(model: PreTrainedModel) -> Tensor:
    """Rows of query_key_value in the order q, k, v: per kv head it holds its queries, its key, its value."""
    config = describe(model)
    heads, size = config["num_attention_heads"], config["head_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    group = heads // kv_heads
    index = torch.arange((heads + 2 * kv_heads) * size).view(kv_heads, group + 2, size)
    return torch.cat([index[:, :group].flatten(), index[:, group].flatten(), index[:, group + 1].flatten()])
