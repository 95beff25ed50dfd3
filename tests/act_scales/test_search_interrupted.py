"""A search that was killed, at any moment, ends as if it had not been; a plan is replaced as any output."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from act_scales.search import Wanted, search
from act_scales.search.passes import Pass
from act_scales.text import Text
from smoothquant import workroom
from smoothquant.errors import OutputError
from smoothquant.layers import FloatLayer
from smoothquant.model import Model
from smoothquant.plan import Plan, PlannedLayer
from smoothquant.scheme import PER_TENSOR
from tests.act_scales.search_cases import SETTINGS
from tests.models import open_llama, sample_ids

LAYERS, TRIALS = 2, 4
WANTED = Wanted(PER_TENSOR, replace(SETTINGS, alpha=0.35), 0.3)  # no alpha of the grid: one trial more
TEXT = Text(tuple(sample_ids(6, 16)), "sample")
MOMENTS = range(1, (1 + TRIALS + 1 + 1) * LAYERS + 1)  # layers done: of the reference, trials, the winner, the curve
WINNER = (1 + TRIALS) * LAYERS


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Model:
    return open_llama(llama_folder)


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of an undisturbed search."""
    plan = search(model, TEXT, tmp_path_factory.mktemp("whole") / "plan", WANTED)
    assert len(plan.facts.candidates) == TRIALS
    return plan


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policy of every pass, as often as it has taken a layer. The state is kept after every layer."""
    found: list[str] = []

    class Counted(Pass):
        def take(self, source: FloatLayer) -> PlannedLayer:
            found.append(self.policy.name)
            return super().take(source)

    monkeypatch.setattr(importlib.import_module("act_scales.search.search"), "Pass", Counted)
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0)
    return found


def killed(model: Model, out: Path, at: int) -> None:
    """Search in a process that dies without a word once `at` layers are done."""
    process = os.fork()
    if not process:
        try:
            search(model, TEXT, out, WANTED, progress=dying(at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def dying(at: int, end: Callable[[], object]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == at:
            end()

    return progress


def left(at: int) -> int:
    """Layers that passes have still to take: a trial begins anew, the winner goes on, what is whole is not repeated."""
    tried = min(max(0, (at - 1) // LAYERS - 1), TRIALS)
    return (TRIALS - tried) * LAYERS + min(LAYERS, LAYERS - (at - WINNER)) if at <= WINNER + LAYERS else 0


@pytest.mark.parametrize("at", MOMENTS)
def test_killed(at: int, model: Model, whole: Plan, taken: list[str], tmp_path: Path) -> None:
    out = tmp_path / "plan"
    killed(model, out, at)
    assert not out.exists()
    seen: list[int] = []
    found = search(model, TEXT, out, WANTED, progress=lambda done, _: seen.append(done))
    assert found.fingerprint == whole.fingerprint
    assert found.for_model(model).facts == whole.facts
    expected = (TRIALS + 1) * LAYERS if at <= LAYERS else left(at)
    assert len(taken) == expected
    assert seen == sorted(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_killed_again_and_again(model: Model, whole: Plan, taken: list[str], tmp_path: Path) -> None:
    """Each time a little later."""
    for at in (3, 4, 6, 9, 11, WINNER + LAYERS + 1):
        killed(model, tmp_path / "plan", at)
    assert search(model, TEXT, tmp_path / "plan", WANTED).fingerprint == whole.fingerprint
    assert not taken


def test_an_error_on_the_way(model: Model, whole: Plan, taken: list[str], tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, TEXT, tmp_path / "plan", WANTED, progress=dying(WINNER + 1, fail))
    assert not (tmp_path / "plan").exists()
    taken.clear()
    assert search(model, TEXT, tmp_path / "plan", WANTED).fingerprint == whole.fingerprint
    assert len(taken) == 1


def test_other_inputs_begin_anew(model: Model, taken: list[str], tmp_path: Path) -> None:
    """What a search for something else has left is of no use."""
    killed(model, tmp_path / "plan", WINNER)
    other = replace(WANTED, settings=SETTINGS)
    search(model, TEXT, tmp_path / "plan", other)
    clean = search(model, TEXT, tmp_path / "clean", other)
    assert len(taken) == 2 * LAYERS * (1 + len(clean.facts.candidates))


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_finished_plan_stays(
    model: Model, taken: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    out = tmp_path / "plan"
    first = search(model, TEXT, out, WANTED)
    before, again = files_of(out), []
    taken.clear()
    with caplog.at_level("INFO", "smoothquant"):
        assert search(model, TEXT, out, WANTED, progress=lambda *now: again.append(now)) == first
    assert files_of(out) == before
    assert not taken
    assert not again
    assert f"{out}: already there, unchanged" in caplog.text
    for other in (replace(WANTED, budget=0.1), replace(WANTED, target_kl=0.5), replace(WANTED, settings=SETTINGS)):
        with pytest.raises(OutputError, match=r"exists and was not made by this command .*--overwrite"):
            search(model, TEXT, out, other)
    with pytest.raises(OutputError):
        search(model, Text(TEXT.sequences[1:], "sample"), out, WANTED)
    assert files_of(out) == before


def test_overwrite(model: Model, whole: Plan, tmp_path: Path) -> None:
    """Replaces a plan, also by itself, and nothing that is somebody else's."""
    out = tmp_path / "plan"
    other = search(model, TEXT, out, replace(WANTED, budget=0.0))
    assert other.fingerprint != whole.fingerprint
    assert search(model, TEXT, out, WANTED, overwrite=True).fingerprint == whole.fingerprint
    before = files_of(out)
    assert search(model, TEXT, out, WANTED, overwrite=True).fingerprint == whole.fingerprint
    assert files_of(out) != before
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("all my work")
    with pytest.raises(OutputError):
        search(model, TEXT, theirs, WANTED, overwrite=True)
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]
