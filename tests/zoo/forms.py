"""The forms in which the Hugging Face Hub holds these models: what `tests.zoo.save` wrote, rewritten.

Each form is a function of (config, tensors); its comment says where it is from. Where a source is a list of keys in
somebody's code, that code was written against the published checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Config = dict[str, object]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OldForm:
    """One form; call it on a folder that holds one of its layouts.

    layouts: of tests.zoo.ZOO. changes: to the config that they are saved with, where the form cannot say theirs.
    bins: so many pytorch_model-*.bin instead of safetensors.
    refused: how transformers 5 says that it does not know the form, and why: a regular expression.
    """

    layouts: tuple[str, ...]
    rewrite: Callable[[Config, Tensors], tuple[Config, Tensors]]
    changes: Mapping[str, object] = field(default_factory=dict)
    bins: int = 0
    refused: str = ""

    def __call__(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        config, tensors = self.rewrite(json.loads((folder / "config.json").read_text()), load_file(weights))
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        weights.unlink()
        if not self.bins:
            save_file(tensors, weights, {"format": "pt"})
            return
        weight_map = {}
        for part in range(self.bins):
            file = f"pytorch_model-{part + 1:05}-of-{self.bins:05}.bin"
            shard = {name: tensors[name] for name in list(tensors)[part :: self.bins]}
            torch.save(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# -- config.json -----------------------------------------------------------------------------------------------------


def as_transformers_4(config: Config, drop: str = "", **changes: object) -> Config:
    """RoPE as rope_theta, rope_scaling and (Phi-3) partial_rotary_factor; dtype as torch_dtype; layer types unsaid.

    drop: keys that were not there yet, separated by blanks.
    """
    config = dict(config) | {"torch_dtype": config["dtype"], "transformers_version": "4.40.0"}
    rope = dict(config.pop("rope_parameters", {}))
    if rope:
        config |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    for key in ("dtype", "layer_types", *drop.split()):
        config.pop(key, None)
    return config | changes


def renamed(config: Config, **names: str) -> Config:
    return {names.get(key, key): value for key, value in config.items()}


# -- tensors ---------------------------------------------------------------------------------------------------------


def without_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def with_head(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    (embedding,) = (name for name in tensors if re.search(r"(embed_tokens|word_embeddings)\.weight$", name))
    return config, tensors | {"lm_head.weight": tensors[embedding].clone()}


def with_inv_freq(config: Config, tensors: Tensors) -> Tensors:
    """The buffers of LlamaRotaryEmbedding, which were persistent until the summer of 2023, one for each layer."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    buffer = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return tensors | {buffer.format(layer): inv_freq.clone() for layer in range(config["num_hidden_layers"])}


# -- Llama, Mistral, Mixtral, Qwen, Phi-3 ------------------------------------------------------------------------------


def llama_1(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """LlamaConfig of transformers 4.28: no grouped heads, no RoPE numbers, no biases."""
    absent = "num_key_value_heads head_dim rope_theta rope_scaling attention_bias mlp_bias attention_dropout"
    return as_transformers_4(config, f"{absent} pretraining_tp"), with_inv_freq(config, tensors)


def llama_2(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """meta-llama/Llama-2-*-hf, transformers 4.31: rope_scaling null, and {"type", "factor"} where there is one."""
    old = as_transformers_4(config, "head_dim rope_theta attention_bias mlp_bias attention_dropout")
    if old["rope_scaling"]:
        old["rope_scaling"] = renamed(old["rope_scaling"], rope_type="type")
    return old, with_inv_freq(config, tensors)


def config_of_4(drop: str = "", **changes: object) -> Callable[[Config, Tensors], tuple[Config, Tensors]]:
    return lambda config, tensors: (as_transformers_4(config, drop, **changes), tensors)


def fused_experts(*parts: str) -> Callable[[Config, Tensors], tuple[Config, Tensors]]:
    """The names that transformers 5 has in memory: save_pretrained(save_original_format=False).
    parts: ends of the names of an expert's gate, up and down."""

    def fuse(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        experts = re.compile(r"(.*)\.experts\.0\." + re.escape(parts[0]))
        for mlp in (found[1] for found in map(experts.fullmatch, tensors) if found):
            gate, up, down = (
                torch.stack([tensors[f"{mlp}.experts.{n}.{part}"] for n in range(config["num_local_experts"])])
                for part in parts
            )
            fused[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            fused[f"{mlp}.experts.down_proj"] = down
        return config, {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in fused.items()}

    return fuse


def qwen3_moe(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Qwen/Qwen3-30B-A3B, transformers 4.51: num_experts, and a key that nobody reads."""
    old = renamed(as_transformers_4(config), num_local_experts="num_experts")
    return old | {"max_window_layers": config["num_hidden_layers"]}, tensors


def phi3_128k(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """microsoft/Phi-3-mini-128k-instruct: the original length beside the factors, and a window that nobody reaches."""
    old = as_transformers_4(config, sliding_window=262144)
    factors = {key: old["rope_scaling"][key] for key in ("short_factor", "long_factor")}
    return old | {"rope_scaling": {"type": "longrope", **factors}}, tensors


# -- BLOOM, OPT --------------------------------------------------------------------------------------------------------

# Left over from Megatron-DeepSpeed; BloomConfig of transformers 4.20 had them. As in PaddleNLP's copy of
# bigscience/bloom-560m/config.json (paddlenlp/transformers/bloom/configuration.py).
MEGATRON = {
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "n_inner": None,
    "offset_alibi": 100,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
}


def bloom_560m(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """bigscience/bloom-*: saved as BloomModel (`word_embeddings.weight`, `h.0...`), n_embed and num_attention_heads."""
    old = as_transformers_4(config, "tie_word_embeddings", architectures=["BloomModel"]) | MEGATRON
    return renamed(old, hidden_size="n_embed", n_head="num_attention_heads"), without_prefix(tensors, "transformer.")


def bloom_finetuned(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """What BloomForCausalLM of transformers 4.22 saves of it: hidden_size and n_head, the prefix, the head."""
    return with_head(as_transformers_4(config, "tie_word_embeddings") | MEGATRON, tensors)


def opt_config(config: Config) -> Config:
    """OPTConfig of transformers 4.21, before biases and norms without weights."""
    return as_transformers_4(
        config,
        "enable_bias layer_norm_elementwise_affine tie_word_embeddings",
        activation_dropout=0.0,
        prefix="</s>",
    )


# Which of facebook/opt-* has which names: microsoft/DeepSpeed, pull request 4694.


def opt_125m(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """facebook/opt-125m, -1.3b, -2.7b, -66b: `model.decoder...` and lm_head."""
    return with_head(opt_config(config), tensors)


def opt_6_7b(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """facebook/opt-350m, -6.7b, -13b, -30b: `decoder...`, no lm_head."""
    return opt_config(config), without_prefix(tensors, "model.")


# -- Falcon ------------------------------------------------------------------------------------------------------------


def falcon_2023(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """tiiuae/falcon-* since September 2023 (transformers 4.33), with a head beside the embedding though they are tied.
    What convert_custom_code_checkpoint.py makes of the form below, so it says only what that one said."""
    of_the_other = "multi_query" if config["new_decoder_architecture"] else "num_kv_heads"
    unsaid = "rope_theta rope_scaling max_position_embeddings activation num_ln_in_parallel_attn ffn_hidden_size"
    old = as_transformers_4(config, f"{of_the_other} {unsaid} tie_word_embeddings pad_token_id")
    return with_head(old | {"apply_residual_connection_post_layernorm": False}, tensors)


def refined_web(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """tiiuae/falcon-* before, with code of their own. The key names: transformers 4.33,
    models/falcon/convert_custom_code_checkpoint.py; n_head_kv is there where the architecture is the new one."""
    old, tensors = falcon_2023(config, tensors)
    new = old.pop("new_decoder_architecture")
    old = renamed(old, num_hidden_layers="n_layer", num_attention_heads="n_head", num_kv_heads="n_head_kv")
    return old | {
        "architectures": ["RWForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_RW.RWConfig",
            "AutoModelForCausalLM": "modelling_RW.RWForCausalLM",
        },
        "model_type": "RefinedWeb" if new else "RefinedWebModel",
    }, tensors


# -- Gemma -------------------------------------------------------------------------------------------------------------


def gemma_3(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """google/gemma-3-*, transformers 4.50: global and local RoPE as three keys, layer types as a number."""
    rope, layer_types = dict(config["rope_parameters"]), config["layer_types"]
    config = config | {"rope_parameters": rope["full_attention"]}
    return as_transformers_4(
        config,
        "tie_word_embeddings _sliding_window_pattern use_bidirectional_attention",
        rope_local_base_freq=rope["sliding_attention"]["rope_theta"],
        sliding_window_pattern=layer_types.index("full_attention") + 1,
        cache_implementation="hybrid",
    ), tensors


LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
TIED = ("llama-tied", "qwen3-tied", "falcon-7b", "opt", "opt-350m", "bloom", "gemma2", "gemma3")
REMOTE_CODE = r"model_type|trust_remote_code"  # unknown to transformers, which asks for the folder's own code

OLD_FORMS: Mapping[str, OldForm] = {
    "llama-1": OldForm(("llama",), llama_1, {"num_key_value_heads": 4}, bins=2),
    "llama-2": OldForm(("llama",), llama_2, bins=2),
    "llama-2-linear": OldForm(("llama",), llama_2, LINEAR_ROPE, bins=2),
    "llama-3": OldForm(("llama", "llama-scaled", "llama-tied", "llama-biased"), config_of_4()),
    "tied-with-head": OldForm(TIED, with_head),  # a torch .bin of a tied model holds both: fine-tunes often do
    "mistral": OldForm(("mistral", "mistral-nemo"), config_of_4("rope_scaling")),
    "mistral-v0.1": OldForm(("mistral",), config_of_4("head_dim rope_scaling attention_dropout"), bins=2),
    "mixtral": OldForm(("mixtral", "mixtral-sliding"), config_of_4("head_dim router_jitter_noise rope_scaling")),
    "mixtral-fused": OldForm(("mixtral",), fused_experts("w1.weight", "w3.weight", "w2.weight")),
    "bloom-560m": OldForm(("bloom", "bloom-6-heads"), bloom_560m),
    "bloom-finetuned": OldForm(("bloom",), bloom_finetuned, bins=2),
    "opt-125m": OldForm(("opt",), opt_125m, bins=1),
    "opt-6.7b": OldForm(("opt", "opt-350m"), opt_6_7b, bins=2),
    "falcon-2023": OldForm(("falcon-7b", "falcon-40b", "falcon-rw"), falcon_2023, bins=2),
    "falcon-refined-web": OldForm(("falcon-7b", "falcon-40b", "falcon-rw"), refined_web, bins=2, refused=REMOTE_CODE),
    # Qwen/Qwen2*: a window is said, and not used
    "qwen2": OldForm(("qwen2",), config_of_4("rope_scaling", sliding_window=131072, max_window_layers=2)),
    "qwen2-sliding": OldForm(("qwen2-sliding",), config_of_4("rope_scaling")),
    "qwen3": OldForm(("qwen3", "qwen3-tied"), config_of_4()),
    "qwen3-yarn": OldForm(("qwen3-yarn",), config_of_4()),
    "qwen3-moe": OldForm(("qwen3-moe", "qwen3-moe-unnormed"), qwen3_moe),
    "qwen3-moe-fused": OldForm(
        ("qwen3-moe", "qwen3-moe-unnormed"),
        fused_experts("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    ),
    "phi3-128k": OldForm(("phi3-longrope",), phi3_128k),
    "granite": OldForm(("granite",), config_of_4()),
    "olmo2": OldForm(("olmo2",), config_of_4()),
    # microsoft/Phi-3-*: code of their own, which nobody needs any more
    "phi3": OldForm(
        ("phi3", "phi3-sliding", "phi3-partial"),
        config_of_4(auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, attention_bias=False),
    ),
    # google/gemma-2-*: the activation by two names, the tie unsaid
    "gemma2": OldForm(
        ("gemma2",),
        config_of_4(
            "tie_word_embeddings use_bidirectional_attention rope_scaling",
            hidden_act="gelu_pytorch_tanh",
            cache_implementation="hybrid",
        ),
    ),
    "gemma3": OldForm(("gemma3",), gemma_3),
}
