"""Some trials of every kind, always the same ones; `python -m tests.fuzz --minutes 60` tries others."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from recipes import families
from smoothquant import rope
from tests import zoo
from tests.fuzz import configs
from tests.fuzz.kinds import KINDS
from tests.fuzz.loop import ACCEPTED, DIFFERENT
from tests.fuzz.mutations import OTHER_TYPES, mutate

ROOT = Path(__file__).parents[2]


def test_nothing_damaged_is_believed() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--trials", "60", "--seed", "12"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    for kind in KINDS:
        assert re.search(rf"^{kind} +60 ", found.stdout, re.MULTILINE), found.stdout


def test_a_wrong_reader_is_a_silent_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness sees by itself what the comparison at opening would refuse."""
    monkeypatch.setattr(families, "check_family", lambda *given, **options: None)
    folder = zoo.save("llama", tmp_path)
    assert configs.judge(folder).name == ACCEPTED
    monkeypatch.setattr(rope, "_theta", lambda *given: 9000.0)
    assert configs.judge(folder).name == DIFFERENT


def test_damage_is_the_same_for_equal_numbers() -> None:
    """Nothing that is put into a config is damaged for the trials to come."""
    before, foreign = copy.deepcopy(OTHER_TYPES), {"new": ({"deep": [1, {"a": []}]},)}
    for number in range(300):
        content: dict = {"a": {"b": [1, 2]}}
        for _ in range(5):
            mutate(Random(number), content, foreign)
            mutate(Random(number + 1), content, foreign)
    assert repr(OTHER_TYPES) == repr(before)
    assert foreign == {"new": ({"deep": [1, {"a": []}]},)}
