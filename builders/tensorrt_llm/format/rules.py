"""Rules of TensorRT-LLM's loader and builder about config.json. All faults are found, not only the first.

shape of the file    required keys, their types, known names
numbers              divisors and ranges
engine               combinations that a builder refuses or builds wrongly (`builders.tensorrt_llm.format.engine_rules`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from builders.tensorrt_llm.format.architectures import ALGORITHMS, ARCHITECTURES, KV_CACHES
from builders.tensorrt_llm.format.config import DTYPES
from builders.tensorrt_llm.format.engine_rules import ROPE_SCALINGS, engine_findings, rope_type
from builders.tensorrt_llm.format.findings import FormatFinding, config_error, config_warning, errors
from smoothquant.config_keys import FEW, LAYERS, POSITIONS, SIZE
from smoothquant.values import FLAG, LIST, NAME, OBJECT, WHOLE, Expectation, number, shown, whole

MOST = 1024  # ranks, of all kinds of parallelism together
RANKS = whole(1, MOST)
POSITIVE = number(0, 1e18, above=True)
REQUIRED = ("architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
VALUES: Mapping[str, Expectation] = {  # of the keys that are there
    **dict.fromkeys(("vocab_size", "hidden_size"), SIZE),
    "intermediate_size": SIZE.or_null(),
    "num_hidden_layers": LAYERS,
    "num_attention_heads": FEW,
    **dict.fromkeys(("num_key_value_heads", "head_size"), FEW.or_null()),
    "max_position_embeddings": POSITIONS.or_null(),
    "rotary_embedding_dim": whole(0, 2**16).or_null(),
    **dict.fromkeys(("rotary_base", "q_scaling", "rotary_pct"), POSITIVE.or_null()),
    **dict.fromkeys(("mapping", "quantization", "moe", "rotary_scaling"), OBJECT.or_null()),
    "norm_epsilon": number(0, 1, above=True),
}
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
QUANTIZATION: Mapping[str, Expectation] = {  # key -> its value unless null: QuantConfig of modeling_utils.py
    "quant_algo": NAME,
    "kv_cache_quant_algo": NAME,
    "group_size": WHOLE,
    "smoothquant_val": number(0, 1),
    "clamp_val": LIST,
    "use_meta_recipe": FLAG,
    "has_zero_point": FLAG,
    "pre_quant_scale": FLAG,
    "exclude_modules": LIST,
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
    for key, value in content.items():
        missing = value is None and key in REQUIRED
        if key in VALUES and not missing and not VALUES[key].holds(value):
            yield config_error(key, shown(value), VALUES[key].expected)
    mapping = content.get("mapping")
    for key in ("world_size", "tp_size", "pp_size", "cp_size"):
        value = mapping.get(key, 1) if isinstance(mapping, Mapping) else 1
        if not RANKS.holds(value):
            yield config_error(f"mapping.{key}", shown(value), RANKS.expected)


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
    for key, rule in QUANTIZATION.items():
        if not rule.or_null().holds(block.get(key)):
            yield config_error(f"quantization.{key}", shown(block[key]), rule.expected)
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
        if not POSITIVE.holds(scaling.get(key)):
            what = shown(scaling[key]) if key in scaling else "missing"
            yield config_error(f"rotary_scaling.{key}", what, f"{POSITIVE.expected}, as {kind} scaling has")
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
    if world != tp * pp * cp or not RANKS.holds(world):
        yield config_error("mapping.world_size", f"{world}", f"tp_size x pp_size, {tp * pp * cp}, at most {MOST}")
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


def _listed(names: Any) -> str:
    return ", ".join(sorted("null" if name is None else name for name in names))
