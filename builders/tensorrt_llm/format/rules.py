"""Rules of TensorRT-LLM's loader and builder about config.json. All faults are found, not only the first.

shape of the file    required keys, their types, known names
numbers              divisors and ranges
engine               combinations that a builder refuses or builds wrongly (`builders.tensorrt_llm.format.engine_rules`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from builders.tensorrt_llm.format.architectures import ALGORITHMS, ARCHITECTURES, KV_CACHES
from builders.tensorrt_llm.format.config import DTYPES
from builders.tensorrt_llm.format.engine_rules import ROPE_SCALINGS, engine_findings, rope_type
from builders.tensorrt_llm.format.findings import FormatFinding, config_error, config_warning, errors

REQUIRED = ("architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIZE, FEW = 2**24, 2**16
LARGEST: Mapping[str, int] = {  # optional integers: bounds far above every model, below what would fill the memory
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": 4096,
    "num_attention_heads": FEW,
    "num_key_value_heads": FEW,
    "head_size": FEW,
    "intermediate_size": SIZE,
    "max_position_embeddings": 2**40,
    "rotary_embedding_dim": FEW,
}
RANKS = 1024  # at most, of all kinds of parallelism together
ACTIVATIONS = (  # ACT2FN of tensorrt_llm/functional.py
    "silu",
    "relu",
    "tanh",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "openai-gelu",
    "geglu",
    "gegelu",
    "identity",
    "softplus",
    "relu2",
    "squared-relu",
    "swiglu",
    "fast-swiglu",
    "sigmoid",
    "quick_gelu",
)
QUANTIZATION: Mapping[str, str] = {  # key -> the type of its value unless null: QuantConfig of modeling_utils.py
    "quant_algo": "a name",
    "kv_cache_quant_algo": "a name",
    "group_size": "a whole number",
    "smoothquant_val": "a number",
    "clamp_val": "a list",
    "use_meta_recipe": "true or false",
    "has_zero_point": "true or false",
    "pre_quant_scale": "true or false",
    "exclude_modules": "a list",
}
LATER = frozenset({"mamba_ssm_cache_dtype"})  # keys of quantization that only some versions know


def config_findings(content: Mapping) -> list[FormatFinding]:
    """All faults of config.json. content: its JSON object."""
    found = [*_shape(content), *_names(content), *_quantization(content), *_rotary(content)]
    if errors(found):
        return found  # numbers are only compared in a file of the right shape
    found += _numbers(content)
    architecture = ARCHITECTURES[content["architecture"]]
    algorithm = ALGORITHMS[(content.get("quantization") or {}).get("quant_algo")]
    return found + list(engine_findings(content, architecture, algorithm))


def _shape(content: Mapping) -> Iterator[FormatFinding]:
    for key in REQUIRED:
        if content.get(key) is None:
            yield config_error(key, "missing")
    for key, most in LARGEST.items():
        value = content.get(key)
        least = 0 if key == "rotary_embedding_dim" else 1
        if value is not None and not (_whole(value) and least <= value <= most):
            yield config_error(key, repr(value), f"a whole number from {least} to {most}")
    for key in ("mapping", "quantization", "moe", "rotary_scaling"):
        if not isinstance(content.get(key) or {}, Mapping):
            yield config_error(key, repr(content[key]), "an object")
    for key in ("rotary_base", "q_scaling", "rotary_pct"):
        value = content.get(key)
        if value is not None and not _positive(value):
            yield config_error(key, repr(value), "a positive number")
    mapping = content.get("mapping")
    for key in ("world_size", "tp_size", "pp_size", "cp_size"):
        value = mapping.get(key, 1) if isinstance(mapping, Mapping) else 1
        if not _whole(value) or not 1 <= value <= RANKS:
            yield config_error(f"mapping.{key}", repr(value), f"a whole number from 1 to {RANKS}")
    epsilon = content.get("norm_epsilon", 1e-5)
    if not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        yield config_error("norm_epsilon", repr(epsilon), "a small positive number")


def _names(content: Mapping) -> Iterator[FormatFinding]:
    name: Any = content.get("architecture")
    known: dict[str, Any] = {"architecture": (name, ARCHITECTURES), "dtype": (content.get("dtype"), DTYPES)}
    for key, (value, choices) in known.items():
        if value is not None and not _among(value, choices):
            yield config_error(key, f"{value!r} is not known here", f"one of {', '.join(choices)}")
    if _among(name, ARCHITECTURES):
        positions, allowed = content.get("position_embedding_type"), ARCHITECTURES[name].positions
        if positions is not None and positions not in allowed:
            yield config_error("position_embedding_type", f"{positions!r} of a {name}", f"one of {', '.join(allowed)}")
    if not _among(content.get("hidden_act", "gelu"), ACTIVATIONS):
        yield config_error("hidden_act", repr(content["hidden_act"]), f"one of {', '.join(ACTIVATIONS)}")
    if content.get("embedding_sharding_dim", 0) not in (0, 1):
        yield config_error("embedding_sharding_dim", repr(content["embedding_sharding_dim"]), "0 or 1")


def _quantization(content: Mapping) -> Iterator[FormatFinding]:
    block = content.get("quantization") or {}
    if not isinstance(block, Mapping):
        return
    for key in block:
        if key in LATER:
            yield config_warning(f"quantization.{key}", "only TensorRT-LLM 1.1 and later know this key", "no such key")
        elif key not in QUANTIZATION:
            yield config_error(
                f"quantization.{key}", "unknown key: a TypeError at load", f"one of {_listed(QUANTIZATION)}"
            )
    for key, kind in QUANTIZATION.items():
        value = block.get(key)
        if value is not None and not KINDS[kind](value):
            yield config_error(f"quantization.{key}", repr(value), kind)
    for key, choices in (("quant_algo", ALGORITHMS), ("kv_cache_quant_algo", KV_CACHES)):
        if not _among(block.get(key), choices):
            yield config_error(f"quantization.{key}", f"{block[key]!r} is not known here", f"one of {_listed(choices)}")


def _rotary(content: Mapping) -> Iterator[FormatFinding]:
    """Yield faults in the numbers of a RoPE scaling.

    TensorRT-LLM replaces a missing number by 1 or by that of Llama 3.1 (RopeEmbeddingUtils.apply_llama3_scaling).
    """
    scaling = content.get("rotary_scaling") or {}
    if not isinstance(scaling, Mapping) or not _among(kind := rope_type(content), ROPE_SCALINGS):
        return
    for key in ROPE_SCALINGS[kind]:
        if not _positive(scaling.get(key)):
            what = repr(scaling[key]) if key in scaling else "missing"
            yield config_error(f"rotary_scaling.{key}", what, f"a positive number, as {kind} scaling has")
            return
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        yield config_error("rotary_scaling.high_freq_factor", f"{high}", f"more than low_freq_factor, {low}")


def _numbers(content: Mapping) -> Iterator[FormatFinding]:
    mapping = content.get("mapping") or {}
    tp, pp, cp = (mapping.get(key, 1) for key in ("tp_size", "pp_size", "cp_size"))
    hidden, heads, layers = (content[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = content.get("num_key_value_heads") or heads
    head_size = content.get("head_size") or hidden // heads
    intermediate = content.get("intermediate_size") or 4 * hidden
    world = mapping.get("world_size", tp * pp)
    if cp != 1:
        yield config_error("mapping.cp_size", f"{cp}", "1: SmoothQuant attention has no context parallelism")
    if world != tp * pp * cp or world > RANKS:
        yield config_error("mapping.world_size", f"{world}", f"tp_size x pp_size, {tp * pp * cp}, at most {RANKS}")
    if content.get("head_size") is None and hidden % heads:
        yield config_error(
            "num_attention_heads", f"{heads}, hidden_size {hidden}", "heads that divide it, or head_size"
        )
    if heads % kv_heads:
        yield config_error("num_key_value_heads", f"{kv_heads}", f"a divisor of num_attention_heads, {heads}")
    for key, value in (("num_attention_heads", heads), ("intermediate_size", intermediate)):
        if value % tp:
            yield config_error("mapping.tp_size", f"{tp}", f"a divisor of {key}, {value}")
    if kv_heads % tp and tp % kv_heads:
        yield config_error("mapping.tp_size", f"{tp}", f"a divisor or a multiple of num_key_value_heads, {kv_heads}")
    if layers % pp:
        yield config_error("mapping.pp_size", f"{pp}", f"a divisor of num_hidden_layers, {layers}")
    if content.get("use_parallel_embedding") and content.get("embedding_sharding_dim", 0) == 1 and hidden % tp:
        yield config_error(
            "mapping.tp_size", f"{tp}", f"a divisor of hidden_size, {hidden}, along which the embedding is split"
        )
    rotary = content.get("rotary_embedding_dim") or head_size
    if rotary > head_size or rotary % 2:
        yield config_error("rotary_embedding_dim", f"{rotary}", f"an even number, at most head_size, {head_size}")


def _among(value: object, names: Any) -> bool:
    return (value is None or isinstance(value, str)) and value in names


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return _whole(value) or isinstance(value, float)


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _listed(names: Any) -> str:
    return ", ".join(sorted("null" if name is None else name for name in names))


KINDS: Mapping[str, Callable[[object], bool]] = {
    "a name": lambda value: isinstance(value, str),
    "a whole number": _whole,
    "a number": _number,
    "a list": lambda value: isinstance(value, list),
    "true or false": lambda value: isinstance(value, bool),
}
