"""config.json of a TensorRT-LLM checkpoint: what its loader asks for, and nothing that it does not know.

    architecture, dtype, logits_dtype       the decoder and its dtypes
    vocab_size, hidden_size, ...            numbers; vocab_size is that of the model, before padding
    keys of the family                      `Decoder.keys`
    mapping                                 how the ranks are made up, without a rank
    quantization                            quant_algo, kv_cache_quant_algo, ...: an unknown key in it fails at load

Format: TensorRT-LLM's PretrainedConfig, QuantConfig and Mapping; the keys are those that NVIDIA's converters write,
except `moe` (its fields differ between versions, and it is nothing for dense models) and where and how it converted.
"""

from __future__ import annotations

from exporters.trtllm.decoders import Decoder
from exporters.trtllm.modes import Mode
from exporters.trtllm.ranks import Ranks
from smoothquant.model import Model

GPUS_PER_NODE = 8


def config(model: Model, decoder: Decoder, mode: Mode, ranks: Ranks, dtype: str, kv: str, alpha: float) -> dict:
    """The content of config.json. dtype: "float16" or "bfloat16"; kv: "float" or "int8"."""
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
            "kv_cache_quant_algo": "INT8" if kv == "int8" else None,
            "group_size": 128,
            "smoothquant_val": alpha,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": None if mode.plugin else ["lm_head"],
        },
    }
