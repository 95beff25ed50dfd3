"""smoothquant search, the exports that its plan makes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from smoothquant.journal import work_folder
from smoothquant.plan import read_plan
from tests import zoo
from tests.forked import assert_one_line, in_a_new_process, smoothquant
from tests.models import TEXT, save_llama

FEW = ("--samples", 12, "--length", 96)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another one, and a text."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model")
    save_llama(folder / "other", seed=1)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def plan(place: Path) -> dict[str, Any]:
    """What `search --json` says of a plan with a budget, static scales and an INT8 cache."""
    options = ("--act", "per-tensor", "--kv", "int8", "--keep-float", "30%")
    return searched(place, "plan", *options)


def search(place: Path, out: str, *options: object) -> tuple[object, ...]:
    return ("search", place / "model", "--text", place / "text.txt", *FEW, "--out", place / out, *options)


def searched(place: Path, out: str, *options: object) -> dict[str, Any]:
    found = smoothquant(*search(place, out, *options), "--json")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_from_a_model_to_a_validated_engine(place: Path, tmp_path: Path) -> None:
    """Search, export, validate. Neither scales nor the text are needed behind search, which is a process of its own."""
    out = place / "shown"
    found = in_a_new_process(*search(place, "shown"))
    assert found.returncode == 0, found.stderr
    said = " ".join(found.stdout.split())
    for part in (
        "Search",
        "by group",
        "alpha 0.8",
        "whole text",
        "0.0%",
        "on 288 tokens that only judge; trials:",
    ):
        assert part in said
    command = f"smoothquant export w8a8 {place / 'model'} --plan {out}"
    assert f"{out}: try {command}" in said
    assert "search: 14 of 14" in found.stderr
    exported = smoothquant(*command.split()[1:], "--out", tmp_path / "w8a8")
    assert exported.returncode == 0, exported.stderr
    stored, plan = load_file(tmp_path / "w8a8/model.safetensors"), read_plan(out)
    rounded = load_file(out / "layers/00001.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert stored[name].equal(rounded[name])
    judged = ("--text", place / "text.txt", "--samples", 4, "--length", 32, "--no-thresholds", "--json")
    validate = ("validate", tmp_path / "w8a8", "--reference", place / "model", *judged)
    validated = smoothquant(*validate, "--plan", out)
    assert validated.returncode == 0, validated.stderr
    [one] = json.loads(validated.stdout)["validations"]
    assert one["subject"]["inputs"]["plan"] == plan.fingerprint
    refused = smoothquant(*validate)
    assert refused.returncode == 2
    assert f"made by the plan with fingerprint {plan.fingerprint}; expected that plan" in refused.stderr


def test_json(place: Path, plan: dict[str, Any]) -> None:
    held = read_plan(place / "plan")
    assert plan.keys() == {"out", "fingerprint", "chosen", "curve", "float_linears"}
    assert plan["out"] == str(place / "plan")
    assert plan["fingerprint"] == held.fingerprint
    assert plan["float_linears"] == list(held.float_linears) != []
    assert [one["share"] for one in plan["curve"]] == [one.share for one in held.facts.curve]
    assert held.facts.scheme.activations.form == "per-tensor"
    assert held.facts.scheme.kv_cache.quantized


def test_it_is_reused(place: Path, plan: dict[str, Any]) -> None:
    found = smoothquant(*search(place, "plan", "--act", "per-tensor", "--kv", "int8", "--keep-float", "30%"))
    assert found.returncode == 0
    assert "already there, unchanged" in found.stdout
    assert "alpha 0.8" in found.stdout
    other = smoothquant(*search(place, "plan"))
    assert_one_line(other, 2, "exists and was not made by this command with these inputs", "or pass --overwrite")


def test_the_next_command_can_hold_the_cache(place: Path, plan: dict[str, Any], tmp_path: Path) -> None:
    """A W8A8 folder has none: the hint names a format that has one, and the target is the plan's."""
    options = ("--act", "per-tensor", "--kv", "int8", "--keep-float", "30%")
    said = " ".join(smoothquant(*search(place, "again", *options)).stdout.split())
    hint = f"smoothquant export onnx {place / 'model'} --plan {place / 'again'}"
    assert hint in said
    exported = smoothquant(*hint.split()[1:], "--out", tmp_path / "onnx")
    assert exported.returncode == 0, exported.stderr
    assert read_plan(place / "again").fingerprint == plan["fingerprint"]


def test_a_target_instead_of_a_budget(place: Path) -> None:
    assert searched(place, "near", "--target-kl", "1")["float_linears"] == []
    refused = smoothquant(*search(place, "nearer", "--target-kl", "1e-9"), "--quiet")
    assert_one_line(refused, 2, "no share of linears in float reaches a KL of 1e-09; expected at least ")
    assert (place / "nearer" / "plan.json").exists()  # the search is not lost, and the next one ends at once


BAD = {
    "act": (("--act", "per-channel"), "--act: invalid choice: 'per-channel'"),
    "kv": (("--kv", "int4"), "--kv: invalid choice: 'int4'"),
    "groups": (("--groups", "none"), "--groups: invalid choice: 'none'"),
    "both": (("--keep-float", "5%", "--target-kl", "0.01"), "not allowed with argument --keep-float"),
    "budget of 0": (("--keep-float", "0%"), "a budget of '0%' for linears in float; expected above 0% and below 100%"),
    "budget of all": (("--keep-float", "100%"), "a budget of '100%' for linears in float; expected above 0% and below"),
    "budget of words": (
        ("--keep-float", "down"),
        "--keep-float down; expected none, or a share of the bytes",
    ),
    "auto": (("--keep-float", "auto"), "--keep-float auto; expected none, or a share of the bytes, as in 5%"),
    "budget too small": (("--keep-float", "1%"), "which none of this model fits into; expected at least 5.56%, its sm"),
    "KL 0": (("--target-kl", "0"), "--target-kl 0.0; expected a number above 0, as 0.005"),
    "KL below 0": (("--target-kl", "-1"), "--target-kl -1.0; expected a number above 0"),
    "KL NaN": (("--target-kl", "nan"), "--target-kl nan; expected a number above 0"),
    "KL infinite": (("--target-kl", "inf"), "--target-kl inf; expected a number above 0"),
    "KL in words": (("--target-kl", "small"), "--target-kl: invalid float value: 'small'"),
    "memory 0": (("--hessian-memory", "0"), "--hessian-memory 0.0; expected GiB, above 0"),
    "memory NaN": (("--hessian-memory", "nan"), "--hessian-memory nan; expected GiB, above 0"),
    "memory infinite": (("--hessian-memory", "inf"), "--hessian-memory inf; expected GiB, above 0"),
    "samples": (("--samples", "0"), "0 samples of 96 tokens; expected at least 1"),
    "too few": (("--samples", "3"), "text.txt: 3 sequences are too few to search on some and to judge by others"),
    "too long": (("--length", "4096"), "1 sequences are too few to search on some|sequences of 4096 tokens"),
    "device": (("--device", "abacus"), "abacus"),
    "max length": (("--max-length", "100000"), "--max-length 100000; expected 1 to 512"),
    "text": (("--text", "nowhere.txt"), "nowhere.txt"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options(what: str, place: Path) -> None:
    options, said = BAD[what]
    found = smoothquant(*search(place, "bad", *options), "--quiet")
    assert found.returncode == 2, found.stderr
    last = found.stderr.splitlines()[-1]
    assert any(part in last for part in said.split("|")), last
    assert "Traceback" not in found.stderr
    assert not (place / "bad").exists()
    assert not work_folder(place / "bad").exists()


def test_bad_inputs(place: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A word. " * 8)
    text = ("--text", place / "text.txt", *FEW, "--out", tmp_path / "out", "--quiet")
    assert_one_line(smoothquant("search", tmp_path / "gone", *text), 2, "gone")
    found = smoothquant("search", place / "model", "--text", short, *FEW, *text[-3:])
    assert found.returncode == 2
    error = found.stderr.splitlines()[-1]  # behind warnings of so little text
    assert error.startswith("smoothquant: short.txt: 1 sequences are too few to search on some and to judge by others")
    olmo = zoo.save("olmo2", tmp_path / "olmo")
    found = smoothquant("search", olmo, *text, "--kv", "int8")
    assert_one_line(found, 2, "INT8 KV cache of keys that are normed over all heads at once", "take a float cache")
    found = smoothquant("search", olmo, *text, "--groups", "paper")
    assert_one_line(found, 2, "smoothing groups 'paper' with family olmo2, which has no such folds")
    inside = (*text[:-2], place / "model" / "plan", "--quiet")
    assert_one_line(smoothquant("search", place / "model", *inside), 2, "the model")
    assert not (tmp_path / "out").exists()
    assert not (place / "model" / "plan").exists()


def test_a_plan_of_something_else(place: Path, plan: dict[str, Any], tmp_path: Path) -> None:
    by_plan, out = ("--plan", place / "plan"), ("--out", tmp_path / "out", "--quiet")
    found = smoothquant("export", "onnx", place / "other", *by_plan, *out)
    assert_one_line(found, 2, f"{place / 'plan'}: a plan for model ", f"that of {place / 'other'}")
    found = smoothquant("export", "w8a8", place / "model", *by_plan, *out)
    assert_one_line(found, 2, "by a plan for another target")
    found = smoothquant("export", "onnx", place / "model", *by_plan, "--act", "per-token", *out)
    assert_one_line(found, 2, "per-token activations, by a plan for another target")
    found = smoothquant("export", "onnx", place / "model", *by_plan, "--alpha", "0.5", *out)
    assert_one_line(found, 2, "--plan with --alpha 0.5; expected one of them")
    found = smoothquant("export", "w8a8", place / "model", "--plan", place / "model", *out)
    assert_one_line(found, 2, str(place / "model"))
    assert not (tmp_path / "out").exists()
