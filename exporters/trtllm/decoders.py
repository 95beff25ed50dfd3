"""What TensorRT-LLM knows of each family: its decoder's name, its config.json, what it cannot do.

A family that is not in `DECODERS` is refused, for the reason in `REFUSED` if there is one. What its decoders are, by
its sources (models/*/model.py and config.py, quantization/quantize.py and layers.py):

    LlamaForCausalLM, MistralForCausalLM  one class; Phi-3 without long or partial RoPE is one, too, its matrices split
    Qwen2ForCausalLM                      biases of q, k and v, none of the dense layer
    BloomForCausalLM                      always biased, norm epsilon 1e-5, no pipeline parallelism
    FalconForCausalLM                     parallel branches: one all-reduce for both, after their biases; its last norm
                                          takes no epsilon (FalconModel.ln_f), and so has LayerNorm's default, 1e-5
    OPTForCausalLM                        no per-token activations (it asserts that its norm returns one tensor, not a
                                          pair); always biased, norm epsilon 1e-5, no pipeline parallelism

GELU is its tanh approximation there, under every name.

config.json holds what its loader asks for, and nothing that it does not know:

    architecture, dtype, logits_dtype       the decoder and its dtypes
    vocab_size, hidden_size, ...            numbers; vocab_size is that of the model, before padding
    keys of the family                      `Decoder.keys`
    mapping                                 how the ranks are made up, without a rank
    quantization                            quant_algo, kv_cache_quant_algo, ...: an unknown key in it fails at load

Format: TensorRT-LLM's PretrainedConfig, QuantConfig and Mapping; the keys are those that NVIDIA's converters write,
except `moe` (its fields differ between versions, and it is nothing for dense models) and where and how it converted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from exporters.trtllm.modes import Mode
from exporters.trtllm.sharding import Ranks
from smoothquant.model import Model
from smoothquant.rope import read_rope

QKV = frozenset("qkv")
ATTENTION = QKV | {"o"}
GATED, PLAIN = frozenset(("gate", "up", "down")), frozenset(("up", "down"))
NONE: frozenset[str] = frozenset()
GPUS_PER_NODE = 8
GELU = {"gelu": "gelu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


@dataclass(frozen=True)
class Decoder:
    """One decoder of TensorRT-LLM.

    position_embedding: "rope_gpt_neox", "alibi" or "learned_absolute". activations: ours -> its.
    biases: combinations of biased linears that it can hold. keys: of config.json, beyond those of every family.
    scalings: of RoPE. pipeline: whether layers may lie in stages. per_token: whether the plugins may quantize per
    token. epsilon: of its norms, where config.json does not decide, or not for all of them.
    """

    architecture: str
    position_embedding: str
    activations: Mapping[str, str]
    biases: tuple[frozenset[str], ...]
    keys: Callable[[Model], dict]
    scalings: tuple[str, ...] = ("default",)
    pipeline: bool = True
    per_token: bool = True
    epsilon: float | None = None


def rope(model: Model) -> dict:
    """RoPE's type and numbers by config.json, read as the model's own decoder reads them."""
    read = read_rope(model.checkpoint.config, model.geometry.head_dim)
    numbers = {key: value for key, value in read.numbers.items() if key != "type"}
    if read.kind == "llama3":  # without it TensorRT-LLM takes that of Llama 3.1
        numbers["original_max_position_embeddings"] = read.original
    return {**numbers, "rope_type": read.kind, "rope_theta": read.theta}


def _rotary(model: Model) -> dict:
    numbers = rope(model)
    base = float(numbers.pop("rope_theta"))
    scaled = numbers["rope_type"] != "default"
    return {"rotary_base": base, "rotary_scaling": numbers if scaled else None}


def _llama(model: Model) -> dict:
    return {
        "mlp_bias": "down" in model.geometry.biased,
        "attn_bias": "o" in model.geometry.biased,
        **_rotary(model),
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "remove_duplicated_kv_heads": False,
        "fc_after_embed": False,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "layer_idx_offset": 0,
        "tie_word_embeddings": model.geometry.tied_embeddings,
    }


def _qwen2(model: Model) -> dict:
    return {
        "attn_bias": True,
        "mlp_bias": False,
        "qwen_type": "qwen2",
        **_rotary(model),
        "seq_length": 8192,
        "use_logn_attn": False,
        "num_labels": 1,
        "moe_intermediate_size": 0,
        "moe_shared_expert_intermediate_size": 0,
        "disable_weight_only_quant_plugin": False,
        "tie_word_embeddings": model.geometry.tied_embeddings,
    }


def _falcon(model: Model) -> dict:
    config = model.checkpoint.config
    new = bool(config.get("new_decoder_architecture", config.get("model_type") == "RefinedWeb"))
    return {
        "bias": "o" in model.geometry.biased,
        "parallel_attention": model.family.parallel,
        "num_ln_in_parallel_attn": (2 if "mlp" in model.family.norms else 1) if new else None,
        "new_decoder_architecture": new,
        "rotary_base": float(rope(model)["rope_theta"]),
    }


_LLAMA = Decoder(
    architecture="LlamaForCausalLM",
    position_embedding="rope_gpt_neox",
    activations={"silu": "silu", "relu": "relu", **GELU},
    biases=(NONE, ATTENTION, GATED, ATTENTION | GATED),
    keys=_llama,
    scalings=("default", "linear", "llama3"),
)
DECODERS: Mapping[str, Decoder] = {
    "llama": _LLAMA,
    "mistral": Decoder(
        architecture="MistralForCausalLM",
        position_embedding="rope_gpt_neox",
        activations=_LLAMA.activations,
        biases=_LLAMA.biases,
        keys=_llama,
        scalings=_LLAMA.scalings,
    ),
    "phi3": _LLAMA,
    "qwen2": Decoder(
        architecture="Qwen2ForCausalLM",
        position_embedding="rope_gpt_neox",
        activations=_LLAMA.activations,
        biases=(QKV,),
        keys=_qwen2,
        scalings=_LLAMA.scalings,
    ),
    "bloom": Decoder(
        architecture="BloomForCausalLM",
        position_embedding="alibi",
        activations=GELU,
        biases=(ATTENTION | PLAIN,),
        keys=lambda model: {},
        pipeline=False,
        epsilon=1e-5,
    ),
    "falcon": Decoder(
        architecture="FalconForCausalLM",
        position_embedding="rope_gpt_neox",
        activations=GELU,
        biases=(NONE, ATTENTION | PLAIN),
        keys=_falcon,
        epsilon=1e-5,
    ),
    "opt": Decoder(
        architecture="OPTForCausalLM",
        position_embedding="learned_absolute",
        activations={"relu": "relu", **GELU},
        biases=(ATTENTION | PLAIN,),
        keys=lambda model: {"do_layer_norm_before": "attention" in model.family.norms},
        pipeline=False,
        per_token=False,
        epsilon=1e-5,
    ),
}

REFUSED: Mapping[str, str] = {
    "mixtral": "its SmoothQuant layers have no experts",
    "qwen3": "its SmoothQuant attention has no norms of queries and keys",
    "gemma2": "its SmoothQuant attention has no soft-capping of scores, and its norms no place behind the branches",
    "gemma3": "its SmoothQuant attention has no norms of queries and keys",
    "granite": "its SmoothQuant attention takes no scale of the scores but 1 / sqrt(head_dim)",
    "olmo2": "its SmoothQuant layers quantize what a norm puts out, and here no norm is before q, k, v, gate and up",
    "qwen3-moe": "its SmoothQuant layers have no experts",
}


def config(model: Model, decoder: Decoder, mode: Mode, ranks: Ranks, dtype: str, alpha: float) -> dict:
    """The content of config.json. dtype: "float16" or "bfloat16"."""
    geometry = model.geometry
    return {
        "architecture": decoder.architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": geometry.vocab_size,
        "max_position_embeddings": geometry.max_positions,
        "hidden_size": geometry.hidden_size,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_size": geometry.head_dim,
        "qk_layernorm": False,
        "hidden_act": decoder.activations[geometry.activation],
        "intermediate_size": geometry.intermediate_size,
        "norm_epsilon": geometry.norm_epsilon,
        "position_embedding_type": decoder.position_embedding,
        "rotary_embedding_dim": geometry.head_dim,
        "runtime_defaults": None,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        **decoder.keys(model),
        "mapping": {
            "world_size": ranks.world_size,
            "gpus_per_node": GPUS_PER_NODE,
            "cp_size": 1,
            "tp_size": ranks.tp,
            "pp_size": ranks.pp,
            "moe_tp_size": ranks.tp,
            "moe_ep_size": 1,
        },
        "quantization": {
            "quant_algo": mode.algo,
            "kv_cache_quant_algo": mode.cache_algo,
            "group_size": 128,
            "smoothquant_val": alpha,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": None if mode.plugin else ["lm_head"],
        },
    }
