"""smoothquant reproduce, against the authors' own way to measure, in transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.families import open_model
from recipes.models import RECIPES
from recipes.recipe import find
from recipes.reproduce import reproduce, whole_blocks
from smoothquant.errors import OutputError, UserError
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer
from tests.families.case import Case, run
from tests.forked import in_a_new_process, smoothquant

LENGTH = 32
ROWS = ["", " = Title = \n", "", "Some words that a byte counts.\n", "More words, with a blank row before.\n"] * 12


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("reproduce"))


@pytest.fixture(scope="module")
def rows_file(case: Case) -> Path:
    path = case.root / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return path


def blocks(case: Case) -> torch.Tensor:
    """In the words of ppl_eval.py: one text, one tokenization, blocks that do not overlap."""
    ids = AutoTokenizer.from_pretrained(case.folder)("\n\n".join(ROWS), return_tensors="pt").input_ids
    count = ids.numel() // LENGTH
    return ids[0, : count * LENGTH].view(count, LENGTH)


@torch.no_grad()
def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    loss = torch.nn.CrossEntropyLoss()
    losses = [loss(one[:-1], row[1:]) * LENGTH for one, row in zip(logits, ids, strict=True)]
    return math.exp(torch.stack(losses).sum() / ids.numel())


def test_both_perplexities(case: Case, rows_file: Path) -> None:
    recipe, ids, out = find("llama-2-7b", RECIPES), blocks(case), case.root / "out"
    scales = case.root / "act_scales.safetensors"
    command = ("reproduce", recipe.name, "--model", case.folder, "--scales", scales, "--text", rows_file)
    command += ("--length", LENGTH, "--out", out)
    assert case.act_scales  # makes the file
    done = in_a_new_process(*command, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["published"] == {"fp16": 5.474, "w8a8": 5.515}
    assert found["sequences"] == len(ids) > 20
    plain = perplexity(AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)(ids).logits, ids)
    assert found["measured"]["plain"] == pytest.approx(plain, rel=1e-6)
    layers = case.smoothed(SmoothingSettings(recipe.alpha, "paper"))
    quantized = run(case.model, ids, (quantize_layer(layer).runnable() for layer in layers))
    assert found["measured"]["w8a8"] == pytest.approx(perplexity(quantized, ids), rel=1e-6)
    assert found["measured"]["w8a8"] != pytest.approx(plain, rel=1e-4)
    shown = smoothquant(*command).stdout  # done: read, not done again
    assert "published" in shown
    assert "5.474" in shown
    assert "bfloat16" in shown


def test_interrupted_goes_on(case: Case, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, model = find("llama", RECIPES), open_model(case.folder)
    scales, text = case.root / "act_scales.safetensors", whole_blocks(str(rows_file), model, 99, LENGTH)
    assert case.act_scales
    whole = reproduce(recipe, model, scales, text, tmp_path / "whole")
    monkeypatch.setattr("smoothquant.workroom.KEEP_EVERY", -1.0)

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(recipe, model, scales, text, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    again = reproduce(recipe, model, scales, text, tmp_path / "out", progress=lambda done, total: seen.append(done))
    assert seen[0] == 1
    assert again == whole


def test_what_cannot_be_reproduced(case: Case, rows_file: Path, tmp_path: Path) -> None:
    model = open_model(case.folder)
    with pytest.raises(UserError, match="tokens; expected at least 512"):
        whole_blocks(str(tmp_path / "short.txt") if (tmp_path / "short.txt").write_text("short") else "", model, 9, 512)
    with pytest.raises(UserError, match="at most 512, this model's positions"):
        whole_blocks(str(rows_file), model, 9, 1024)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    assert case.act_scales
    text = whole_blocks(str(rows_file), model, 9, LENGTH)
    with pytest.raises(OutputError, match="exists"):
        reproduce(find("llama", RECIPES), model, case.root / "act_scales.safetensors", text, tmp_path / "out")
