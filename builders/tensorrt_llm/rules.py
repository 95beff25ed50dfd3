"""What TensorRT-LLM's loader and builder demand of config.json, as findings: every fault, not the first one.

shape of the file    keys that must be there, their types, names that must be known
numbers              what has to divide what
engine               combinations that a builder of 0.20 to 1.2.1 refuses, or builds wrongly
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from builders.tensorrt_llm.architectures import (
    ALGORITHMS,
    ARCHITECTURES,
    KV_CACHES,
    SCALED_ALIBI,
    Algorithm,
    Architecture,
)
from builders.tensorrt_llm.config import DTYPES, falcon_form
from builders.tensorrt_llm.findings import ERROR, WARNING, Finding, errors

FILE = "config.json"
REQUIRED = ("architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
POSITIVE = (  # integers, where they are given
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "intermediate_size",
    "max_position_embeddings",
    "rotary_embedding_dim",
)
QUANTIZATION = frozenset(
    {
        "quant_algo",
        "kv_cache_quant_algo",
        "group_size",
        "smoothquant_val",
        "clamp_val",
        "use_meta_recipe",
        "has_zero_point",
        "pre_quant_scale",
        "exclude_modules",
    }
)
LATER = frozenset({"mamba_ssm_cache_dtype"})  # keys of quantization that only some versions know
ROPE_SCALINGS = ("linear", "llama3")
INT8_ALIGNMENT = 4  # the kernels' weights are declared as four int8 in one float32


def config_findings(content: Mapping) -> list[Finding]:
    """Everything that is wrong with config.json. content: its JSON object."""
    found = [*_shape(content), *_names(content), *_quantization(content)]
    if errors(found):
        return found  # numbers of a file that cannot be read say nothing
    found += _numbers(content)
    architecture = ARCHITECTURES[content["architecture"]]
    algorithm = ALGORITHMS[(content.get("quantization") or {}).get("quant_algo")]
    return found + list(_engine(content, architecture, algorithm))


def _error(where: str, what: str, expected: str = "") -> Finding:
    return Finding(ERROR, f"{FILE} {where}", what, expected)


def _warning(where: str, what: str, expected: str = "") -> Finding:
    return Finding(WARNING, f"{FILE} {where}", what, expected)


def _shape(content: Mapping) -> Iterator[Finding]:
    for key in REQUIRED:
        if content.get(key) is None:
            yield _error(key, "missing")
    for key in POSITIVE:
        value = content.get(key)
        if value is not None and (not _whole(value) or value < (0 if key == "rotary_embedding_dim" else 1)):
            yield _error(key, repr(value), "a positive whole number")
    for key in ("mapping", "quantization", "moe", "rotary_scaling"):
        if not isinstance(content.get(key) or {}, Mapping):
            yield _error(key, repr(content[key]), "an object")
    for key in ("rotary_base", "q_scaling", "rotary_pct"):
        value = content.get(key)
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            yield _error(key, repr(value), "a positive number")
    mapping = content.get("mapping")
    for key in ("world_size", "tp_size", "pp_size", "cp_size"):
        value = mapping.get(key, 1) if isinstance(mapping, Mapping) else 1
        if not _whole(value) or value < 1:
            yield _error(f"mapping.{key}", repr(value), "a positive whole number")
    if not isinstance(content.get("hidden_act", "gelu"), str):
        yield _error("hidden_act", repr(content["hidden_act"]), "a name")
    epsilon = content.get("norm_epsilon", 1e-5)
    if not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        yield _error("norm_epsilon", repr(epsilon), "a small positive number")


def _names(content: Mapping) -> Iterator[Finding]:
    name: Any = content.get("architecture")
    known: dict[str, Any] = {"architecture": (name, ARCHITECTURES), "dtype": (content.get("dtype"), DTYPES)}
    for key, (value, choices) in known.items():
        if value is not None and not _among(value, choices):
            yield _error(key, f"{value!r} is not known here", f"one of {', '.join(choices)}")
    if _among(name, ARCHITECTURES):
        positions, allowed = content.get("position_embedding_type"), ARCHITECTURES[name].positions
        if positions is not None and positions not in allowed:
            yield _error("position_embedding_type", f"{positions!r} of a {name}", f"one of {', '.join(allowed)}")
    if content.get("embedding_sharding_dim", 0) not in (0, 1):
        yield _error("embedding_sharding_dim", repr(content["embedding_sharding_dim"]), "0 or 1")


def _quantization(content: Mapping) -> Iterator[Finding]:
    block = content.get("quantization") or {}
    if not isinstance(block, Mapping):
        return
    for key in block:
        if key in LATER:
            yield _warning(f"quantization.{key}", "only TensorRT-LLM 1.1 and later know it", "no such key")
        elif key not in QUANTIZATION:
            yield _error(f"quantization.{key}", "unknown key: a TypeError at load", f"of {_listed(QUANTIZATION)}")
    for key, choices in (("quant_algo", ALGORITHMS), ("kv_cache_quant_algo", KV_CACHES)):
        if not _among(block.get(key), choices):
            yield _error(f"quantization.{key}", f"{block[key]!r} is not known here", f"one of {_listed(choices)}")


def _numbers(content: Mapping) -> Iterator[Finding]:
    mapping = content.get("mapping") or {}
    tp, pp, cp = (mapping.get(key, 1) for key in ("tp_size", "pp_size", "cp_size"))
    hidden, heads, layers = (content[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = content.get("num_key_value_heads") or heads
    head_size = content.get("head_size") or hidden // heads
    intermediate = content.get("intermediate_size") or 4 * hidden
    world = mapping.get("world_size", tp * pp)
    if cp != 1:
        yield _error("mapping.cp_size", f"{cp}", "1: SmoothQuant attention has no context parallelism")
    if world != tp * pp * cp:
        yield _error("mapping.world_size", f"{world}", f"{tp * pp * cp}, tp_size x pp_size")
    if content.get("head_size") is None and hidden % heads:
        yield _error("num_attention_heads", f"{heads}, hidden_size {hidden}", "heads that divide it, or head_size")
    if heads % kv_heads:
        yield _error("num_key_value_heads", f"{kv_heads}", f"a divisor of num_attention_heads, {heads}")
    for key, value in (("num_attention_heads", heads), ("intermediate_size", intermediate)):
        if value % tp:
            yield _error("mapping.tp_size", f"{tp}", f"a divisor of {key}, {value}")
    if kv_heads % tp and tp % kv_heads:
        yield _error("mapping.tp_size", f"{tp}", f"a divisor or a multiple of num_key_value_heads, {kv_heads}")
    if layers % pp:
        yield _error("mapping.pp_size", f"{pp}", f"a divisor of num_hidden_layers, {layers}")
    if content.get("use_parallel_embedding") and content.get("embedding_sharding_dim", 0) == 1 and hidden % tp:
        yield _error("mapping.tp_size", f"{tp}", f"a divisor of hidden_size, {hidden}, which the embedding is split by")
    rotary = content.get("rotary_embedding_dim") or head_size
    if rotary > head_size or rotary % 2:
        yield _error("rotary_embedding_dim", f"{rotary}", f"an even number, at most head_size, {head_size}")


def _engine(content: Mapping, architecture: Architecture, algorithm: Algorithm) -> Iterator[Finding]:
    for wrong, key, what, expected in RULES:
        if wrong(content, architecture, algorithm):
            yield _error(key, what, expected)
    for wrong, key, what, expected in DOUBTS:
        if wrong(content, architecture, algorithm):
            yield _warning(key, what, expected)


Rule = tuple[Callable[[Mapping, Architecture, Algorithm], Any], str, str, str]


def _misaligned(content: Mapping, architecture: Architecture, algorithm: Algorithm) -> bool:
    tp = (content.get("mapping") or {}).get("tp_size", 1)
    hidden, heads = content["hidden_size"], content["num_attention_heads"]
    attention = heads * (content.get("head_size") or hidden // heads) // tp
    intermediate = (content.get("intermediate_size") or 4 * hidden) // tp
    return algorithm.form == "plugin" and any(size % INT8_ALIGNMENT for size in (hidden, attention, intermediate))


def _rope_type(content: Mapping) -> str | None:
    scaling = content.get("rotary_scaling") or {}
    return scaling.get("rope_type") or scaling.get("type")


RULES: tuple[Rule, ...] = (  # whether it is broken; the key; what, expected
    (
        lambda content, architecture, algorithm: content.get("qk_layernorm"),
        "qk_layernorm",
        "SmoothQuant attention has no norms of queries and keys",
        "false",
    ),
    (
        lambda content, architecture, algorithm: (content.get("moe") or {}).get("num_experts", 0),
        "moe.num_experts",
        "SmoothQuant has no layers for experts",
        "0",
    ),
    (
        lambda content, architecture, algorithm: (
            algorithm.form == "plugin" and algorithm.per_token and not architecture.dynamic
        ),
        "quantization.quant_algo",
        "this architecture's decoder layer takes no per-token activations (an assertion in the builder)",
        "a static mode, W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN or W8A8_SQ_PER_TENSOR_PLUGIN",
    ),
    (
        lambda content, architecture, algorithm: content.get("do_layer_norm_before") is False,
        "do_layer_norm_before",
        "false: a norm behind the linears is none that quantizes their input",
        "true",
    ),
    (
        lambda content, architecture, algorithm: (
            content["architecture"] == "FalconForCausalLM"
            and content.get("num_ln_in_parallel_attn") == 2
            and not falcon_form(content)[0]
        ),
        "num_ln_in_parallel_attn",
        "2, where attention and MLP are one after the other",
        "1 or null",
    ),
    (
        _misaligned,
        "hidden_size",
        "a linear's input on a rank is no multiple of 4 channels, which the INT8 kernels demand",
        "hidden_size, heads x head_size / tp_size and intermediate_size / tp_size that are",
    ),
    (
        lambda content, architecture, algorithm: (
            content.get("position_embedding_type") == "learned_absolute" and not content.get("max_position_embeddings")
        ),
        "max_position_embeddings",
        "missing",
        "the number of learned positions",
    ),
)
DOUBTS: tuple[Rule, ...] = (
    (
        lambda content, architecture, algorithm: (
            algorithm.form == "plugin" and content.get("position_embedding_type") == SCALED_ALIBI
        ),
        "position_embedding_type",
        "SmoothQuant attention hands slopes on for 'alibi' only: alibi_with_scale is likely to compute without a bias",
        "validation on the GPU before anybody serves it",
    ),
    (
        lambda content, architecture, algorithm: (
            algorithm.form == "plugin" and (content.get("quantization") or {}).get("exclude_modules")
        ),
        "quantization.exclude_modules",
        "is ignored in the plugin modes: every linear of a layer is quantized",
        "null",
    ),
    (
        lambda content, architecture, algorithm: _rope_type(content) not in (None, "default", *ROPE_SCALINGS),
        "rotary_scaling",
        "of a type that this tool cannot run",
        "linear or llama3",
    ),
    (
        lambda content, architecture, algorithm: "rank" in (content.get("mapping") or {}),
        "mapping.rank",
        "is the loader's own, and does not belong into the file",
        "no such key",
    ),
)


def _among(value: object, names: Any) -> bool:
    return (value is None or isinstance(value, str)) and value in names


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(names: Any) -> str:
    return ", ".join(sorted("null" if name is None else name for name in names))
