"""--memory: what a budget is, what is below the least, and that what is held stays within it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from act_scales import collect as calibration
from act_scales.store import ActScales
from act_scales.text import Text
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from smoothquant.errors import UserError
from smoothquant.memory import Budget, for_export, parse, spelled
from tests import zoo
from tests.forked import assert_one_line, smoothquant
from tests.models import sample_ids


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GB", 2 * 10**9), ("2 GiB", 2 << 30), ("1.5g", 1_500_000_000), ("500MB", 5 * 10**8)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse(text) == nbytes


@pytest.mark.parametrize("text", ["", "2", "GB", "-2GB", "0GB", "2GB3", "two", "2PB", "1e3MB", "nanGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a size"):
        parse(text)


def test_spelled_sizes_are_enough() -> None:
    for nbytes in (1, 999_999_999, 10**9, 1_234_567_890):
        assert nbytes <= parse(spelled(nbytes)) < 1.1 * nbytes + 10**6


def test_too_little_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    model, out = zoo.save("llama", tmp_path / "model"), tmp_path / "out"
    few = ("--memory", "100MB", "--out", out)
    least = ("--memory 100MB: too little for", "expected at least", "the least that would do")
    text = ("--text", tmp_path / "absent.txt")
    assert_one_line(smoothquant("calibrate", model, *text, *few), 2, *least)
    assert_one_line(smoothquant("export", "w8a8", model, tmp_path / "absent.safetensors", *few), 2, *least)
    assert_one_line(
        smoothquant("export", "w8a8", model, "--memory", "2", "--out", out), 2, "--memory 2; expected a size"
    )
    assert not out.exists()


@pytest.mark.parametrize("layout", ["llama", "bloom", "mixtral"])
def test_calibration_by_slices(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums, but for their last bits; mapped hidden states; experts that are read when they run."""
    model = open_model(zoo.save(layout, tmp_path / "model"))
    text = Text(tuple(sample_ids(3, 32)), "random")
    whole = calibration.collect(model, text, tmp_path / "whole.safetensors")
    monkeypatch.setattr(calibration, "for_calibration", lambda *_: Budget(numbers=700, tokens=32, states=0))
    sliced = calibration.collect(model, text, tmp_path / "sliced.safetensors")
    for kind in ("input_absmax", "output_absmax", "input_mean_square", "held_absmax"):
        expected, found = getattr(whole, kind), getattr(sliced, kind)
        assert expected
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)


def test_what_is_held_stays_within_the_budget(tmp_path: Path) -> None:
    """An export with the least that would do, of a layer that takes a third more by itself."""
    save_random_llama(tmp_path / "model", layers=1, hidden=2048, intermediate=16384, vocabulary=1000)
    model, scales = open_model(tmp_path / "model"), tmp_path / "scales.safetensors"
    ActScales({name: torch.rand(shape[1]) + 0.5 for name, shape in model.linears()}).save(scales)
    with pytest.raises(UserError, match="at least") as refused:
        for_export(model, 1)
    least = refused.value.expected.split()[2].rstrip(",")
    held = _peak("export", "w8a8", tmp_path / "model", scales, "--out", tmp_path / "out", "--memory", least)
    assert held <= parse(least)


def _peak(*arguments: object) -> int:
    """The peak resident memory of a command, in bytes. A small process starts it: a child counts its parent's."""
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", measure, sys.executable, "-m", "recipes.cli", *map(str, arguments), "--quiet"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(found.stdout) << 10
