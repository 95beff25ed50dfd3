"""The architectures of TensorRT-LLM checkpoints, one record each: what a name in config.json stands for.

A layer is    h += dense(attention(norm(h)));  h += proj(act(fc(norm(h))))          one after the other, or in parallel
gated         proj(act(fc(x)) * gate(x)): `fc` is Hugging Face's gate_proj, `gate` its up_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNSET_EPSILON = 1e-5  # LayerNorm's own
LEARNED, ROPE, ALIBI, SCALED_ALIBI = "learned_absolute", "rope_gpt_neox", "alibi", "alibi_with_scale"


@dataclass(frozen=True)
class Architecture:
    """What all models of one architecture share.

    norm: "rms" or "layer" (with bias). gated: whether the MLP has a `gate`.
    positions: values of position_embedding_type that it may have.
    qkv_bias, dense_bias, mlp_bias: whether the linears have one, or the key of config.json that says so.
    embedding_norm: a norm behind the embedding (`ln_embed`). parallel: attention and MLP may read one input.
    dynamic: whether its decoder layer takes what the per-token modes give it.
    unset_epsilon: names of norms to which NVIDIA's models/ hand no epsilon: they have LayerNorm's, not config.json's.
    """

    norm: str
    gated: bool
    positions: tuple[str, ...]
    qkv_bias: bool | str
    dense_bias: bool | str
    mlp_bias: bool | str
    embedding_norm: bool = False
    parallel: bool = False
    dynamic: bool = True
    unset_epsilon: tuple[str, ...] = ()


_LLAMA = Architecture("rms", True, (ROPE,), qkv_bias="attn_bias", dense_bias="attn_bias", mlp_bias="mlp_bias")
_NORMS = ("input_layernorm", "post_layernorm", "ln_f")
_BIASED: dict[str, Any] = {"qkv_bias": True, "dense_bias": True, "mlp_bias": True}

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("rms", True, (ROPE,), "attn_bias", dense_bias=False, mlp_bias="mlp_bias"),
    "BloomForCausalLM": Architecture(
        "layer", False, (ALIBI,), embedding_norm=True, unset_epsilon=("ln_embed", *_NORMS), **_BIASED
    ),
    "OPTForCausalLM": Architecture("layer", False, (LEARNED,), dynamic=False, unset_epsilon=_NORMS, **_BIASED),
    "GPT2LMHeadModel": Architecture("layer", False, (LEARNED,), **_BIASED),
    "FalconForCausalLM": Architecture(
        "layer",
        False,
        (ROPE, SCALED_ALIBI),
        qkv_bias="bias",
        dense_bias="bias",
        mlp_bias="bias",
        parallel=True,
        unset_epsilon=("post_layernorm", "ln_f"),
    ),
}


@dataclass(frozen=True)
class Algorithm:
    """A value of quantization.quant_algo.

    form: "float"; "plugin", NVIDIA's SmoothQuant kernels; or "qdq", Q/DQ around every linear, as ModelOpt writes it.
    per_channel: one weight scale for each output channel, or one for each matrix.
    per_token: one activation scale for each token, found at run time, or one for each tensor, from calibration.
    """

    form: str
    per_channel: bool = True
    per_token: bool = False

    @property
    def static(self) -> bool:
        """Whether the kernels take calibrated activation scales."""
        return self.form == "plugin" and not self.per_token


ALGORITHMS: Mapping[str | None, Algorithm] = {
    None: Algorithm("float"),
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": Algorithm("plugin", per_channel=True, per_token=True),
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": Algorithm("plugin", per_channel=False, per_token=True),
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": Algorithm("plugin", per_channel=True, per_token=False),
    "W8A8_SQ_PER_TENSOR_PLUGIN": Algorithm("plugin", per_channel=False, per_token=False),
    "W8A8_SQ_PER_CHANNEL": Algorithm("qdq", per_channel=True, per_token=False),
}
KV_CACHES = (None, "INT8", "FP8")
RUNNABLE_ACTIVATIONS: Mapping[str, str] = {  # hidden_act -> the function that it is, of those that this tool computes
    "silu": "silu",
    "swiglu": "silu",  # in a gated MLP
    "relu": "relu",
    "gelu": "gelu",
    "geglu": "gelu",  # in a gated MLP
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "openai-gelu": "gelu",
}
