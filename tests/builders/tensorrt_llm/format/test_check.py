"""Spoil each thing that can be spoiled, and see it found and named; and nothing else found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders.tensorrt_llm import check
from builders.tensorrt_llm.format.checkpoint import is_checkpoint
from builders.tensorrt_llm.format.findings import ERROR, WARNING, FormatFinding
from tests.builders.tensorrt_llm.checkpoints import ALGORITHMS, PER_TOKEN, write
from tests.forked import assert_one_line, smoothquant
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


def only(found: list[FormatFinding]) -> FormatFinding:
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
    assert_one_line(smoothquant("check", tmp_path / "absent"), 2, "no such file")
    assert_one_line(smoothquant("check", tmp_path), 2, "no such file", "model.onnx")
