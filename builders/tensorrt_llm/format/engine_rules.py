"""Rules about combinations that the builders of TensorRT-LLM 0.20 to 1.2.1 refuse or build wrongly.

alignment    An INT8 GEMM reads 16 channels at once, and writes 8 (float32: 4): 128 bits. CUTLASS's can_implement asks
             for it (cutlass_extensions' gemm_with_epilogue_visitor.h; DefaultGemmConfiguration's alignments in
             int8_gemm_template.h). The plugin's profiler skips what fails, the engine is built all the same, and stops
             at its first prompt of more than four tokens: "No valid SQ GEMM tactic" (smoothQuantGemmPlugin.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from builders.tensorrt_llm.format.architectures import (
    ALIBI,
    RUNNABLE_ACTIVATIONS,
    SCALED_ALIBI,
    UNSET_EPSILON,
    Algorithm,
    Architecture,
)
from builders.tensorrt_llm.format.config import falcon_form
from builders.tensorrt_llm.format.findings import FormatFinding, config_error, config_warning

ROPE_SCALINGS: Mapping[str, tuple[str, ...]] = {  # type -> its numbers
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
INPUTS_AT_ONCE, OUTPUTS_AT_ONCE = 16, {"float16": 8, "bfloat16": 8, "float32": 4}
REASON = "which the INT8 kernels move at once"


def engine_findings(content: Mapping, architecture: Architecture, algorithm: Algorithm) -> Iterator[FormatFinding]:
    """Yield the faults of a config.json whose keys, names and types are right."""
    for wrong, key, what, expected in RULES:
        if wrong(content, architecture, algorithm):
            yield config_error(key, what, expected)
    if algorithm.form == "plugin":
        yield from _alignment(content)
    for wrong, key, what, expected in DOUBTS:
        if wrong(content, architecture, algorithm):
            yield config_warning(key, what, expected)


Rule = tuple[Callable[[Mapping, Architecture, Algorithm], Any], str, str, str]


def _alignment(content: Mapping) -> Iterator[FormatFinding]:
    tp = (content.get("mapping") or {}).get("tp_size", 1)
    hidden, heads = content["hidden_size"], content["num_attention_heads"]
    head_size, kv_heads = content.get("head_size") or hidden // heads, content.get("num_key_value_heads") or heads
    inputs = {
        "hidden_size": hidden,
        "num_attention_heads": heads // tp * head_size,
        "intermediate_size": (content.get("intermediate_size") or 4 * hidden) // tp,
    }
    for key, channels in inputs.items():
        if channels % INPUTS_AT_ONCE:
            yield config_error(
                key, f"{channels} channels of a linear's input on a rank", f"a multiple of {INPUTS_AT_ONCE}, {REASON}"
            )
    rows, at_once = (heads // tp + 2 * math.ceil(kv_heads / tp)) * head_size, OUTPUTS_AT_ONCE[content["dtype"]]
    if rows % at_once:
        yield config_error("head_size", f"{rows} rows of qkv on a rank", f"a multiple of {at_once}, {REASON}")


def rope_type(content: Mapping) -> Any:
    """The type of config.json's rotary_scaling, in either spelling of its key; None without one."""
    scaling = content.get("rotary_scaling") or {}
    return scaling.get("rope_type") or scaling.get("type")


RULES: tuple[Rule, ...] = (  # a test that is true for a fault; the key; what was found; what was expected
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
        lambda content, architecture, algorithm: (
            algorithm.form == "plugin"
            and content.get("position_embedding_type") == ALIBI
            and content["dtype"] == "bfloat16"
        ),
        "dtype",
        "SmoothQuant attention hands the slopes of ALiBi over in float16, whatever the dtype",
        "float16",
    ),
    (
        lambda content, architecture, algorithm: content.get("do_layer_norm_before") is False,
        "do_layer_norm_before",
        "false: a norm behind the linears cannot quantize their input",
        "true",
    ),
    (
        lambda content, architecture, algorithm: (
            content["architecture"] == "FalconForCausalLM"
            and content.get("num_ln_in_parallel_attn") == 2
            and not falcon_form(content)[0]
        ),
        "num_ln_in_parallel_attn",
        "2, but attention and MLP run one after the other",
        "1 or null",
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
        "SmoothQuant attention takes slopes for 'alibi' only: alibi_with_scale is likely to compute without a bias",
        "validation on the GPU before it is served",
    ),
    (
        lambda content, architecture, algorithm: (
            algorithm.form == "plugin" and (content.get("quantization") or {}).get("exclude_modules")
        ),
        "quantization.exclude_modules",
        "is ignored in the plugin modes, which quantize every linear of a layer",
        "null",
    ),
    (
        lambda content, architecture, algorithm: rope_type(content) not in (None, "default", *ROPE_SCALINGS),
        "rotary_scaling",
        "has a type that this tool cannot run",
        "linear or llama3",
    ),
    (
        lambda content, architecture, algorithm: content.get("hidden_act") not in (None, *RUNNABLE_ACTIVATIONS),
        "hidden_act",
        "TensorRT-LLM knows this activation, but this tool cannot run it",
        f"one of {', '.join(RUNNABLE_ACTIVATIONS)}, to validate here",
    ),
    (
        lambda content, architecture, algorithm: (
            architecture.unset_epsilon and content.get("norm_epsilon", UNSET_EPSILON) != UNSET_EPSILON
        ),
        "norm_epsilon",
        "is not the epsilon of all norms: this architecture builds some without it",
        f"{UNSET_EPSILON}",
    ),
    (
        lambda content, architecture, algorithm: "rank" in (content.get("mapping") or {}),
        "mapping.rank",
        "is set by the loader and does not belong in the file",
        "no such key",
    ),
)
