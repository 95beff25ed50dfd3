"""Every rule about config.json: broken, it is found and named; nonsense is findings, never a crash."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.tensorrt_llm.format.config import parse
from builders.tensorrt_llm.format.findings import WARNING, FormatFinding, errors
from builders.tensorrt_llm.format.rules import VALUES, config_findings
from builders.tensorrt_llm.format.tensors import expected
from tests.builders.tensorrt_llm.checkpoints import PER_TOKEN

STATIC = "W8A8_SQ_PER_TENSOR_PLUGIN"


def only(found: list[FormatFinding]) -> FormatFinding:
    assert len(found) == 1, [finding.sentence for finding in found]
    return found[0]


CONFIG = {
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "vocab_size": 288,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    "quantization": {"quant_algo": PER_TOKEN, "kv_cache_quant_algo": None},
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def mapping(world: int, tp: int = 1, pp: int = 1, **more: int) -> dict:
    return {"mapping": {"world_size": world, "tp_size": tp, "pp_size": pp, **more}}


def quantization(**changes: object) -> dict:
    return {"quantization": CONFIG["quantization"] | changes}


SIZES = [key for key, rule in VALUES.items() if rule.expected.startswith("a whole number")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (quantization(group=1), r"quantization.group: unknown key: a TypeError at load; expected .*clamp_val"),
        (quantization(quant_algo="W8A8_SQ"), r"quant_algo: 'W8A8_SQ' is not known here; expected one of W8A8_SQ_PER_"),
        (quantization(kv_cache_quant_algo="INT4"), r"kv_cache_quant_algo: 'INT4' is not known"),
        ({"quantization": "none"}, r'quantization: "none"; expected an object'),
        ({"architecture": None}, r"architecture: missing"),
        ({"architecture": "Qwen3ForCausalLM"}, r"architecture: 'Qwen3ForCausalLM' is not known here"),
        ({"dtype": "float8"}, r"dtype: 'float8' is not known here; expected one of float16, bfloat16, float32"),
        ({"hidden_size": None}, r"hidden_size: missing"),
        ({"hidden_size": "64"}, r'hidden_size: "64"; expected a whole number from 1 to 16777216'),
        ({"vocab_size": 0}, r"vocab_size: 0; expected a whole number from 1"),
        (mapping(2**40, 2**40), r"mapping.tp_size: 1099511627776; expected a whole number from 1 to 1024"),
        (mapping(2**20, 2**10, 2**10), r"mapping.world_size: 1048576; expected a whole number from 1 to 1024"),
        ({"mapping": {"tp_size": 64, "pp_size": 32}}, r"mapping.world_size: 2048; expected .* at most 1024"),
        *[({key: 10**30}, f"{key}: {10**30}; expected a whole number") for key in SIZES],
        ({"num_hidden_layers": True}, r"num_hidden_layers: true; expected a whole number from 1 to 4096"),
        ({"norm_epsilon": -1}, r"norm_epsilon: -1; expected a number above 0 and up to 1"),
        ({"position_embedding_type": "alibi"}, r"'alibi' of a LlamaForCausalLM; expected one of rope_gpt_neox"),
        ({"embedding_sharding_dim": 2}, r"embedding_sharding_dim: 2; expected 0 or 1"),
        (mapping(2, 1, 1), r"mapping.world_size: 2; expected tp_size x pp_size, 1"),
        (mapping(3, 3), r"mapping.tp_size: 3; expected a divisor of num_attention_heads, 4"),
        (mapping(3, pp=3), r"mapping.pp_size: 3; expected a divisor of num_hidden_layers, 2"),
        (mapping(2, cp_size=2), r"mapping.cp_size: 2; expected 1"),
        (mapping(0, 0), r"mapping.tp_size: 0; expected a whole number from 1"),
        ({"mapping": [1]}, r"mapping: \[1\]; expected an object"),
        ({"hidden_size": 2**40}, r"hidden_size: 1099511627776; expected a whole number from 1 to 16777216"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers: 1000000000; expected a whole number from 1 to 4096"),
        (mapping(1, 10**9), r"mapping.tp_size: 1000000000; expected a whole number from 1 to 1024"),
        ({"rotary_base": float("nan")}, r"rotary_base: NaN; expected a number above 0"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads: 3; expected a divisor of num_attention_heads, 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, r"5, hidden_size 64; expected heads that divide it"),
        (
            mapping(4, 4) | {"num_attention_heads": 12, "head_size": 16, "num_key_value_heads": 6},
            r"4; expected a divisor",
        ),
        (mapping(4, 4) | {"intermediate_size": 130}, r"tp_size: 4; expected a divisor of intermediate_size, 130"),
        ({"rotary_embedding_dim": 18}, r"rotary_embedding_dim: 18; expected an even number, at most head_size, 16"),
        ({"qk_layernorm": True}, r"qk_layernorm: SmoothQuant attention has no norms of queries"),
        ({"moe": {"num_experts": 8}}, r"moe.num_experts: SmoothQuant has no layers for experts"),
        (
            mapping(2, 2) | {"intermediate_size": 688},
            r"intermediate_size: 344 channels of a linear's input on a rank; expected a multiple of 16, which the INT8",
        ),
        ({"hidden_size": 72, "head_size": 16}, r"hidden_size: 72 channels"),
        (mapping(4, 4) | {"head_size": 24}, r"num_attention_heads: 24 channels"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 1, "head_size": 2},
            r"head_size: 20 rows of qkv on a rank; expected a multiple of 8",
        ),
        ({"hidden_act": "foo"}, r"hidden_act: 'foo'; expected one of silu, relu, tanh, gelu"),
        ({"hidden_act": 3}, r"hidden_act: 3; expected one of"),
        ({"rotary_scaling": {"rope_type": "llama3"}}, r"rotary_scaling.factor: missing; expected a number above 0"),
        (
            {"rotary_scaling": {"type": "linear", "factor": "2"}},
            r'rotary_scaling.factor: "2"; expected a number',
        ),
        (
            {"rotary_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            r"high_freq_factor: 1.0; expected more than low_freq_factor, 1.0",
        ),
        (quantization(group_size="x"), r'quantization.group_size: "x"; expected a whole number'),
        (quantization(smoothquant_val="half"), r'quantization.smoothquant_val: "half"; expected a number from 0 to 1'),
        (quantization(has_zero_point=0), r"quantization.has_zero_point: 0; expected true or false"),
        (quantization(exclude_modules="lm_head"), r'quantization.exclude_modules: "lm_head"; expected a list'),
        ({"architecture": "OPTForCausalLM", "max_position_embeddings": 64}, r"takes no per-token activations"),
        (
            {"architecture": "OPTForCausalLM", "position_embedding_type": "learned_absolute"}
            | quantization(quant_algo=STATIC),
            r"max_position_embeddings: missing; expected the number of learned positions",
        ),
        (
            {"architecture": "BloomForCausalLM", "position_embedding_type": "alibi", "dtype": "bfloat16"},
            r"dtype: SmoothQuant attention hands the slopes of ALiBi over in float16, .*; expected float16",
        ),
        ({"do_layer_norm_before": False}, r"do_layer_norm_before: false"),
        ({"architecture": "FalconForCausalLM", "num_ln_in_parallel_attn": 2}, r"num_ln_in_parallel_attn: 2, but"),
    ],
)
def test_config(changes: dict, said: str) -> None:
    assert config_findings(CONFIG) == []
    content = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    found = errors(config_findings(content))
    assert found
    sentences = [finding.sentence for finding in found]
    assert any(re.search(said, sentence) for sentence in sentences), sentences


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (quantization(mamba_ssm_cache_dtype=None), "quantization.mamba_ssm_cache_dtype"),
        (quantization(exclude_modules=["lm_head"]), "quantization.exclude_modules"),
        (mapping(1, rank=0), "mapping.rank"),
        ({"rotary_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary_scaling"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        (
            {"architecture": "FalconForCausalLM", "position_embedding_type": "alibi_with_scale"},
            "position_embedding_type",
        ),
    ],
)
def test_doubts_are_warnings(changes: dict, where: str) -> None:
    finding = only(config_findings(CONFIG | changes))
    assert (finding.severity, finding.where) == (WARNING, f"config.json {where}")


def test_only_the_plugins_ask_for_alignment() -> None:
    """And in float32 they write 4 channels at once."""
    odd = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_size": 2}
    assert config_findings(CONFIG | odd | {"dtype": "float32"}) == []
    for algorithm in ("W8A8_SQ_PER_CHANNEL", None):
        assert (
            config_findings(CONFIG | mapping(4, 4) | {"intermediate_size": 136} | quantization(quant_algo=algorithm))
            == []
        )


MORE = (
    "head_size",
    "norm_epsilon",
    "rotary_embedding_dim",
    "rotary_base",
    "rotary_scaling",
    "moe",
    "hidden_act",
    "max_position_embeddings",
    "embedding_sharding_dim",
    "use_parallel_embedding",
    "num_ln_in_parallel_attn",
)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, *MORE]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner, max_size=2),
            max_leaves=3,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_nonsense_is_findings_and_no_crash(changes: dict) -> None:
    content = CONFIG | changes
    found = config_findings(content)
    if not errors(found):
        config = parse(content)
        assert all(min(tensor.shape) > 0 for tensor in expected(config, config.ranks - 1).values())
    for finding in found:
        assert finding.where.startswith("config.json ")
        assert "\n" not in finding.sentence
