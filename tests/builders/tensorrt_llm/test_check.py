"""Spoil each thing that can be spoiled, and see it found and named; and nothing else found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders.findings import ERROR, WARNING, Finding, errors
from builders.tensorrt_llm import check
from builders.tensorrt_llm.checkpoint import is_checkpoint
from builders.tensorrt_llm.config import parse
from builders.tensorrt_llm.rules import config_findings
from builders.tensorrt_llm.tensors import expected
from tests.builders.tensorrt_llm.checkpoints import ALGORITHMS, PER_TOKEN, write
from tests.recipes.test_bad_input import assert_one_line, smoothquant
from tests.zoo import build

STATIC = "W8A8_SQ_PER_TENSOR_PLUGIN"
RANK = "rank0.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static, on two ranks, with an INT8 cache and biases: all kinds of tensors. Read only."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write(build("llama-biased"), folder, STATIC, tp=2, kv_cache="INT8")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def change(folder: Path, rank: int, spoil: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / f"rank{rank}.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, [finding.sentence for finding in found]
    return found[0]


def test_a_whole_one(whole: Path) -> None:
    assert check(whole) == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_tensor_that_is_taken_away_is_missed(algorithm: str | None, tmp_path: Path) -> None:
    """One by one, all of them, and only they. (lm_head may be tied to the embedding.)"""
    write(build("falcon-40b"), tmp_path, algorithm, kv_cache="INT8", tp=2)
    tensors = load_file(tmp_path / RANK)
    for name in tensors:
        save_file({other: value for other, value in tensors.items() if other != name}, tmp_path / RANK)
        assert only(check(tmp_path)).where == f"{RANK} {name}"
        assert only(check(tmp_path)).what == "missing"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_tensor_of_another_shape_or_kind_is_named(algorithm: str | None, tmp_path: Path) -> None:
    write(build("llama-biased"), tmp_path, algorithm)
    tensors = load_file(tmp_path / RANK)
    for name, value in tensors.items():
        longer = torch.cat([value, value[:1]]) if value.dim() < 2 else torch.cat([value, value[:, :1]], dim=1)
        save_file(tensors | {name: longer}, tmp_path / RANK)
        finding = only(check(tmp_path))
        assert (finding.severity, finding.where) == (ERROR, f"{RANK} {name}")
        assert finding.what == f"has shape {list(longer.shape)}"
        assert finding.expected == str(list(value.shape))
        save_file(tensors | {name: value.to(torch.int32)}, tmp_path / RANK)
        finding = only(check(tmp_path))
        assert (finding.severity, finding.what) == (ERROR, "is I32")


def test_another_float_is_a_warning(folder: Path) -> None:
    """So it is of the loader's."""
    change(folder, 0, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}))
    finding = only(check(folder))
    assert (finding.severity, finding.what, finding.expected) == (WARNING, "is float16", "float32")


def test_an_extra_tensor_is_a_warning(folder: Path) -> None:
    change(folder, 1, lambda tensors: tensors.update({"transformer.layers.0.attention.rotary": torch.ones(3)}))
    finding = only(check(folder))
    assert (finding.severity, finding.where) == (WARNING, "rank1.safetensors transformer.layers.0.attention.rotary")


def float_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for name, value in load_file(folder / RANK).items() if value.is_floating_point()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_a_number_that_is_none_is_found_anywhere(
    whole: Path, tmp_path: Path, data: st.DataObject, value: float
) -> None:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    name = data.draw(st.sampled_from(sorted(float_tensors(whole))))
    index = data.draw(st.integers(0, float_tensors(whole)[name].numel() - 1))

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    change(folder, 0, spoil)
    found = [
        finding for finding in check(folder) if "differs" not in finding.what
    ]  # from rank 1's, where it should not
    assert only(found).where == f"{RANK} {name}"
    assert only(found).what == f"holds {value}, first at {index}"


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_scales_are_positive(value: float, folder: Path) -> None:
    scales = [
        "input_layernorm.scale_to_int",
        "attention.qkv.per_channel_scale",
        "attention.dense.act_scale",
        "attention.quantization_scaling_factor",
        "attention.kv_cache_scaling_factor",
        "mlp.quantization_scaling_factor",
    ]
    for rank in range(2):
        change(folder, rank, lambda tensors: [tensors[f"transformer.layers.1.{name}"].fill_(value) for name in scales])
    found = check(folder)
    for rank in range(2):
        named = {finding.where for finding in found if finding.expected == "scales > 0"}
        assert {f"rank{rank}.safetensors transformer.layers.1.{name}" for name in scales} <= named
    assert len(found) == 12


def test_a_smoother_of_zero_and_a_negative_one(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.layers.0.mlp.proj.smoother"][0, 7] = 0
        tensors["transformer.layers.0.attention.dense.smoother"][0, 3] *= -1  # odd, and no fault

    change(folder, 1, spoil)
    finding = only(check(folder))
    assert finding.where == "rank1.safetensors transformer.layers.0.mlp.proj.smoother"
    assert finding.what == "holds 0, first at 7"


def test_what_ranks_share_is_the_same(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.layers.1.post_layernorm.weight"][5] += 1
        tensors["transformer.layers.0.attention.dense.per_channel_scale"] *= 2
        tensors["transformer.layers.0.attention.dense.bias"][0] += 1
        tensors["transformer.layers.0.attention.qkv.bias"][0] += 1  # its own

    change(folder, 1, spoil)
    assert [finding.where.split()[1] for finding in check(folder)] == [
        "transformer.layers.0.attention.dense.per_channel_scale",
        "transformer.layers.0.attention.dense.bias",
        "transformer.layers.1.post_layernorm.weight",
    ]


def test_stages_share_nothing(tmp_path: Path) -> None:
    write(build("llama"), tmp_path, PER_TOKEN, tp=2, pp=2)
    assert check(tmp_path) == []


def test_files(folder: Path) -> None:
    (folder / "rank1.safetensors").rename(folder / "rank2.safetensors")
    found = check(folder)
    assert [(finding.severity, finding.where) for finding in found] == [
        (ERROR, "rank1.safetensors"),
        (WARNING, "rank2.safetensors"),
    ]
    (folder / RANK).write_bytes((folder / RANK).read_bytes()[:-100])
    assert "truncated or corrupt" in check(folder)[2].what
    (folder / "config.json").write_text("[]")
    assert only(check(folder)).what == "not a JSON object"
    (folder / "config.json").write_text("{")
    assert only(check(folder)).what.startswith("not JSON")
    (folder / "config.json").unlink()
    assert only(check(folder)).what == "no such file"


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


def mapping(world: int, tp: int = 1, pp: int = 1, **more: int) -> dict:
    return {"mapping": {"world_size": world, "tp_size": tp, "pp_size": pp, **more}}


def quantization(**changes: object) -> dict:
    return {"quantization": CONFIG["quantization"] | changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (quantization(group=1), r"quantization.group: unknown key: a TypeError at load; expected of clamp_val"),
        (quantization(quant_algo="W8A8_SQ"), r"quant_algo: 'W8A8_SQ' is not known here; expected one of W8A8_SQ_PER_"),
        (quantization(kv_cache_quant_algo="INT4"), r"kv_cache_quant_algo: 'INT4' is not known"),
        ({"quantization": "none"}, r"quantization: 'none'; expected an object"),
        ({"architecture": None}, r"architecture: missing"),
        ({"architecture": "Qwen3ForCausalLM"}, r"architecture: 'Qwen3ForCausalLM' is not known here"),
        ({"dtype": "float8"}, r"dtype: 'float8' is not known here; expected one of float16, bfloat16, float32"),
        ({"hidden_size": None}, r"hidden_size: missing"),
        ({"hidden_size": "64"}, r"hidden_size: '64'; expected a positive whole number"),
        ({"vocab_size": 0}, r"vocab_size: 0; expected a positive whole number"),
        ({"num_hidden_layers": True}, r"num_hidden_layers: True"),
        ({"norm_epsilon": -1}, r"norm_epsilon: -1; expected a small positive number"),
        ({"position_embedding_type": "alibi"}, r"'alibi' of a LlamaForCausalLM; expected one of rope_gpt_neox"),
        ({"embedding_sharding_dim": 2}, r"embedding_sharding_dim: 2; expected 0 or 1"),
        (mapping(2, 1, 1), r"mapping.world_size: 2; expected 1, tp_size x pp_size"),
        (mapping(3, 3), r"mapping.tp_size: 3; expected a divisor of num_attention_heads, 4"),
        (mapping(3, pp=3), r"mapping.pp_size: 3; expected a divisor of num_hidden_layers, 2"),
        (mapping(2, cp_size=2), r"mapping.cp_size: 2; expected 1"),
        (mapping(0, 0), r"mapping.tp_size: 0; expected a positive whole number"),
        ({"mapping": [1]}, r"mapping: \[1\]; expected an object"),
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
        (mapping(4, 4) | {"intermediate_size": 136}, r"hidden_size: a linear's input on a rank is no multiple of 4"),
        ({"architecture": "OPTForCausalLM", "max_position_embeddings": 64}, r"takes no per-token activations"),
        (
            {"architecture": "OPTForCausalLM", "position_embedding_type": "learned_absolute"}
            | quantization(quant_algo=STATIC),
            r"max_position_embeddings: missing; expected the number of learned positions",
        ),
        ({"do_layer_norm_before": False}, r"do_layer_norm_before: false"),
        ({"architecture": "FalconForCausalLM", "num_ln_in_parallel_attn": 2}, r"num_ln_in_parallel_attn: 2, where"),
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
        (
            {"architecture": "FalconForCausalLM", "position_embedding_type": "alibi_with_scale"},
            "position_embedding_type",
        ),
    ],
)
def test_doubts_are_warnings(changes: dict, where: str) -> None:
    finding = only(config_findings(CONFIG | changes))
    assert (finding.severity, finding.where) == (WARNING, f"config.json {where}")


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


def test_what_looks_like_a_checkpoint(whole: Path, folder: Path, tmp_path: Path) -> None:
    assert is_checkpoint(whole)
    (folder / "config.json").unlink()
    assert is_checkpoint(folder)
    assert not is_checkpoint(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert not is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_config": {}, "build_config": {}}))  # an engine's
    assert not is_checkpoint(tmp_path)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    found = smoothquant("check", folder, "--quiet")
    assert (found.returncode, "nothing is wrong with it" in found.stdout) == (0, True)
    change(folder, 0, lambda tensors: tensors.pop("transformer.ln_f.weight"))
    configure(folder, mapping={"world_size": 2, "tp_size": 2, "pp_size": 1, "rank": 0})
    found = smoothquant("check", folder, "--json", "--quiet")
    assert_one_line(found, 1, f"{RANK} transformer.ln_f.weight: missing; expected float32 [64]; make it again")
    content = json.loads(found.stdout)
    assert content["kind"] == "TensorRT-LLM checkpoint"
    assert [finding["severity"] for finding in content["findings"]] == [WARNING, ERROR]
    assert "transformer.ln_f.weight" in smoothquant("check", folder).stdout
    assert_one_line(smoothquant("check", tmp_path / "absent"), 2, "no such file or folder")
    assert_one_line(smoothquant("check", tmp_path), 2, "nothing that can be checked", "TensorRT-LLM checkpoint")
