"""smoothquant calibrate: what it says of a model before it starts, and the length that is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from act_scales.store import ActScales, load_act_scales
from recipes.cli.calibrate import warn_of_silence
from recipes.cli.ui import Ui
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import BorrowRanges
from smoothquant.stream import smooth_layer
from tests import zoo
from tests.forked import assert_one_line, smoothquant
from tests.models import TEXT, hooked_absmax, open_llama, sample_ids

NOTE = {
    "olmo2": "no norm of this model feeds linears alone: only v -> o and up -> down can be smoothed",
    "opt-350m": "no norm of this model feeds linears alone: only v -> o and up -> down can be smoothed",
    "granite": "",
}


@pytest.mark.parametrize("layout", NOTE)
def test_it_says_where_no_norm_feeds_linears(layout: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text of some length. " * 20)
    options = ("--samples", 1, "--length", 32, "--out", tmp_path / "s.safetensors")
    found = smoothquant("calibrate", zoo.save(layout, tmp_path / "model"), "--text", text, *options)
    assert found.returncode == 0, found.stderr
    said = " ".join((found.stdout + found.stderr).split())
    assert NOTE[layout] in said
    assert ("feeds linears alone" in said) == bool(NOTE[layout])


def test_a_length_beyond_the_frequencies_is_refused_and_another_set_takes_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text of some length. " * 40)
    model, out = zoo.save("phi3-longrope", tmp_path / "model"), tmp_path / "s.safetensors"
    command = ("calibrate", model, "--text", text, "--samples", 1, "--length", 300, "--out", out)
    refused = smoothquant(*command, "--quiet")
    assert_one_line(refused, 2, "sequences of 300 tokens; expected at most 256", "or a --max-length that allows it")
    assert_one_line(smoothquant(*command, "--max-length", 1000), 2, "--max-length 1000; expected 1 to 512")
    found = smoothquant(*command, "--max-length", 512)
    assert found.returncode == 0, found.stderr


def test_what_every_sequence_begins_with_is_said_and_recorded(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """By calibrate, validate and compare; `--sequence-start none` cuts one stream, as a document of its own begins."""
    model, text = make_llama(), tmp_path / "text.txt"
    text.write_text(TEXT)
    few = ("--text", text, "--samples", 4, "--length", 32)
    out = {start: tmp_path / f"{start}.safetensors" for start in ("plain", "tokenizer", "none")}
    assert "begins with" not in smoothquant("calibrate", model, *few, "--out", out["plain"]).stderr
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(model / "tokenizer.json"))
    said = smoothquant("calibrate", model, *few, "--out", out["tokenizer"])
    assert "4 sequences, 128 tokens from text.txt, each sequence begins with <s>" in " ".join(said.stderr.split())
    smoothquant("calibrate", model, *few, "--sequence-start", "none", "--out", out["none"])
    told = {start: load_act_scales(path).metadata for start, path in out.items()}
    assert {start: one["sequence_start"] for start, one in told.items()} == {
        "plain": "",
        "tokenizer": "<s>",
        "none": "",
    }
    assert len({one["text_fingerprint"] for one in told.values()}) == 3
    compared = smoothquant("compare", model, model, *few, "--json")
    assert json.loads(compared.stdout)["text_fingerprint"] == told["tokenizer"]["text_fingerprint"]
    assert json.loads(compared.stdout)["sequence_start"] == "<s>"
    smoothquant("export", "hf", model, out["tokenizer"], "--out", tmp_path / "hf", "--alpha", 0.5)
    validated = smoothquant("validate", tmp_path / "hf", "--reference", model, *few, "--no-thresholds", "--json")
    [found] = json.loads(validated.stdout)["validations"]
    assert found["subject"]["sequence_start"] == "<s>"
    assert "of which begins with <s>, against" in (tmp_path / "hf" / "README.md").read_text()
    refused = smoothquant("calibrate", model, *few[:4], "--length", 1, "--out", tmp_path / "one.safetensors")
    assert_one_line(refused, 2, "sequences of 1 tokens, which the tokenizer begins with <s>; expected at least 2")


def test_an_input_that_is_always_zero_is_no_experts(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """A dense model has no experts that a range could be borrowed from."""
    folder, down = make_llama(), "model.layers.1.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = open_llama(folder)
    scales = ActScales(hooked_absmax(folder, sample_ids()))
    assert scales.zero == (down,)
    ui = Ui(quiet=True)
    with ui.err.capture() as said:
        warn_of_silence(ui, scales, model)
    [line] = said.get().splitlines()
    assert line.startswith(f"warning: the input of {down} was zero for every token of the calibration")
    assert "expert" not in line
    layer = smooth_layer(model, 1, scales.input_absmax, SmoothingSettings(0.5))
    assert not BorrowRanges()(layer).input_absmax["down"].any()
