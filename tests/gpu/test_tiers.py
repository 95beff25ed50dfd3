"""The tiers of docker/tensorrt/gpu_check.sh: what runs without a GPU, and what becomes of a tier that goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.benchmarks import gpu
from tests.gpu import conftest, torch_alone
from tests.gpu.outcomes import FAILED, FILE, NOT_RUN, OK, Outcome, read, record, table
from tests.gpu.tiers import TIERS, Tier, run

CHECK = Path(__file__).parents[2] / gpu.GPU_CHECK
RECORD = "from tests.gpu.outcomes import *; record('early', OK, 'seen')"


def test_torch_alone_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, against the CPU itself; what a check raises is its own failure."""
    monkeypatch.setenv(FILE, str(tmp_path / "found"))
    assert torch_alone.run("cpu")
    found = read(tmp_path / "found")
    assert [(outcome.name, outcome.verdict) for outcome in found] == [(name, OK) for name in torch_alone.CHECKS]
    assert "perplexity" in found[3].detail

    def broken(here: torch_alone.Here) -> str:
        raise ValueError("CUDA error")

    monkeypatch.setattr(torch_alone, "CHECKS", {"one": broken, "two": lambda here: here.device})
    assert not torch_alone.run("cpu")
    failed, fine = Outcome("one", FAILED, "ValueError: CUDA error"), Outcome("two", OK, "cpu")
    assert read(tmp_path / "found")[-2:] == [failed, fine]


@pytest.mark.parametrize("wrong", ["integers", "scales"])
def test_a_wrong_device_is_noticed(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose integer sums, or whose ranges, are off."""
    here = torch_alone.Here("cpu", tmp_path, torch_alone.open_model(torch_alone.tiny_llama.PATH))
    if wrong == "integers":
        right = torch_alone.torch._int_mm
        monkeypatch.setattr("torch._int_mm", lambda x, weight: right(x, weight) + 1)
        with pytest.raises(AssertionError, match=r"2048 of 2048 sums over 64 channels are wrong"):
            torch_alone.exact_products(here)
        tokens = torch_alone.quantize_input
        monkeypatch.setattr(torch_alone, "quantize_input", lambda *given: (tokens(*given)[0] // 2, tokens(*given)[1]))
        with pytest.raises(AssertionError, match=r"outputs are \S+e-01 apart"):
            torch_alone.layers(here)
    else:
        monkeypatch.setattr(torch_alone, "_distance", lambda found, expected: 0.01)
        with pytest.raises(AssertionError, match=r"act scales are 1\.0e-02 apart"):
            torch_alone.calibration(here)


def test_a_tier_that_goes_wrong_stops_no_other() -> None:
    """Nor does one that hangs; what it found before is told."""
    tiers = {
        "dies": Tier(("-c", f"{RECORD}; import os; os.abort()"), on_cpu=True),
        "hangs": Tier(("-c", f"{RECORD}; import time; time.sleep(60)"), on_cpu=True),
        "says": Tier(("-c", "from tests.gpu.outcomes import *; record('one', FAILED, 'x'); raise SystemExit(1)"), True),
        "whole": Tier(("-c", RECORD), on_cpu=True),
        "gpu": Tier(("-c", RECORD)),
    }
    rows = run(tiers, "cpu", seconds=3, say=lambda words: None)
    early = Outcome("early", OK, "seen")
    assert rows == [
        ("dies", early),
        ("dies", Outcome("the tier", FAILED, "ended with status -6; see above")),
        ("hangs", early),
        ("hangs", Outcome("the tier", FAILED, "stopped after 3 s")),
        ("says", Outcome("one", FAILED, "x")),
        ("whole", early),
        ("gpu", Outcome("the tier", NOT_RUN, "it needs a GPU")),
    ]
    assert "hangs    FAILED  the tier  stopped after 3 s" in table(rows).splitlines()


def test_what_became_of_a_test_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiers that are tests: as those that are skipped where there is no TensorRT."""
    monkeypatch.setenv(FILE, str(tmp_path / "found"))
    skipped, raised = ("conftest.py", 24, "Skipped: no NVIDIA GPU"), "E   ValueError\nE   AssertionError: assert 1 == 2"
    for when, outcome, reason in (
        ("setup", "passed", None),
        ("call", "passed", None),
        ("teardown", "passed", None),
        ("setup", "skipped", skipped),
        ("call", "failed", raised),
    ):
        report = pytest.TestReport("tests/a.py::test[x]", ("a.py", 1, "t"), {}, outcome, reason, when)
        conftest.pytest_runtest_logreport(report)
    assert read(tmp_path / "found") == [
        Outcome("test[x]", OK),
        Outcome("test[x]", NOT_RUN, "Skipped: no NVIDIA GPU"),
        Outcome("test[x]", FAILED, "E AssertionError: assert 1 == 2"),
    ]


def test_every_tier_is_there() -> None:
    """Modules that Python finds, and tests that the expression chooses."""
    assert list(TIERS) == ["torch", "forms", "overflow", "speed"]
    for tier in TIERS.values():
        assert tier.words[0] == "-m"
        assert find_spec(tier.words[1])
    text = (Path(__file__).parent / "test_tensorrt_on_a_gpu.py").read_text()
    chosen = [word for name in ("forms", "overflow") for word in TIERS[name].words[8].split(" or ")]
    for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE):
        assert any(word in name for word in chosen)


def test_the_script() -> None:
    """Without a GPU and without nvidia-smi: a table, and the status of a check that has not failed."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    command = [CHECK, "--device", "cpu", "forms"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.splitlines()[-1]) == (0, "forms    not run the tier  it needs a GPU")
    assert subprocess.run([CHECK, "from"], env=environment, capture_output=True, check=False).returncode == 2


def test_what_is_recorded_is_one_short_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE, str(tmp_path / "found"))
    record("name", FAILED, "two\nlines " + "x" * 1000)
    with open(tmp_path / "found", "a") as file:
        file.write('{"name": "cut o')
    [outcome] = read(tmp_path / "found")
    assert (outcome.name, outcome.detail[:10], len(outcome.detail)) == ("name", "two lines ", 300)
