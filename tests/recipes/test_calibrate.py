"""smoothquant calibrate: what it says of a model before it starts, and the length that is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import zoo
from tests.recipes.test_bad_input import assert_one_line, smoothquant

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
