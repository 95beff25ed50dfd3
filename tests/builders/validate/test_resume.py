"""A validation that is interrupted, wherever, ends with the numbers of one that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from act_scales.text import Text
from builders.validate import Thresholds, Validation, run, validate_engines
from smoothquant import hidden, sweep, workroom
from smoothquant.journal import work_folder
from smoothquant.model import Model
from smoothquant.workroom import forget

LABELS = ("w8a8", "static", "hf")
STEPS = 2 + 3 * 4  # layers, and sequences of every engine

Validate = Callable[..., list[Validation]]


class Interrupt(KeyboardInterrupt):
    """Stands for Ctrl-C."""


@pytest.fixture(params=["memory", "mapped", "one block"])
def validating(
    request: pytest.FixtureRequest, llama: Model, text: Text, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> Validate:
    """Validates three engines. What has been found is kept after every layer and every sequence."""
    monkeypatch.setattr(hidden, "IN_MEMORY", 0 if request.param == "mapped" else 1 << 30)
    monkeypatch.setattr(run, "HELD", 1 << 30 if request.param == "one block" else 0)
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0)
    engines, limits = {label: folders / label for label in LABELS}, {"w8a8": Thresholds(exactness_ratio=9.0)}
    return lambda **options: validate_engines(engines, llama, text, limits, device="cpu", **options)


@pytest.fixture(scope="module")
def wholes() -> dict[str, list[Validation]]:
    """By the parameter of `validating`; `whole` fills it."""
    return {}


@pytest.fixture
def whole(
    request: pytest.FixtureRequest, validating: Validate, wholes: dict[str, list[Validation]]
) -> list[Validation]:
    """What a validation that is not interrupted finds, computed once for each of the fixture's parameters."""
    kind = request.node.callspec.params["validating"]
    if kind not in wholes:
        wholes[kind] = validating()
    return wholes[kind]


def interrupting(stop: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        assert total == STEPS
        if done == stop:
            raise Interrupt

    return progress


@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_it_goes_on_near_where_it_stopped(
    stop: int, validating: Validate, whole: list[Validation], tmp_path: Path
) -> None:
    told: list[int] = []
    with pytest.raises(Interrupt):
        validating(work=tmp_path / "found.json", progress=interrupting(stop))
    found = validating(work=tmp_path / "found.json", progress=lambda done, total: told.append(done))
    assert found == whole
    assert min(set(told) - {0, 2}) >= stop - 1  # only the step under way is done again; 2: all layers are
    forget(tmp_path / "found.json")
    assert not list(tmp_path.iterdir())


def test_what_was_finished_is_only_read(validating: Validate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = validating(work=tmp_path / "found.json")
    monkeypatch.setattr(sweep.decoder, "forward", None)
    assert validating(work=tmp_path / "found.json") == whole


def test_interrupted_again_and_again(validating: Validate, whole: list[Validation], tmp_path: Path) -> None:
    stops = []
    for stop in range(1, STEPS):
        with pytest.raises(Interrupt):
            validating(work=tmp_path / "found.json", progress=interrupting(stop))
        stops.append(stop)
    assert validating(work=tmp_path / "found.json") == whole


def test_another_engine_begins_again(
    validating: Validate, llama: Model, text: Text, folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupt):
        validating(work=tmp_path / "found.json", progress=interrupting(STEPS - 1))
    told: list[int] = []
    options: dict[str, Any] = {"work": tmp_path / "found.json", "progress": lambda done, total: told.append(done)}
    (found,) = validate_engines({"w8a8": folders / "naive"}, llama, text, device="cpu", **options)
    assert told[1] == 0
    assert found == validate_engines({"w8a8": folders / "naive"}, llama, text, device="cpu")[0]


@pytest.mark.parametrize(
    ("damaged", "note"),
    [
        (1, "the last state of an interrupted run is damaged; it goes on from the one before"),
        (2, "what an interrupted run left is damaged; it starts again"),
    ],
)
def test_a_broken_state_is_told_and_not_used(
    damaged: int,
    note: str,
    validating: Validate,
    whole: list[Validation],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = tmp_path / "found.json"
    with pytest.raises(Interrupt):
        validating(work=work, progress=interrupting(STEPS - 1))
    kept = list(work_folder(work).glob(f"state.{run.COMPARED}.*"))
    assert len(kept) == 2
    for path in sorted(kept, key=lambda path: int(path.name.split(".")[2]), reverse=True)[:damaged]:
        path.write_bytes(path.read_bytes()[:99])
    caplog.clear()
    told: list[int] = []
    assert validating(work=work, progress=lambda done, total: told.append(done)) == whole
    assert [record.getMessage() for record in caplog.records] == [f"{work}: {note}"]
    assert (told[1] == 0) == (damaged == 2)


@pytest.mark.parametrize(("held", "opened"), [(1 << 30, 3 + 3), (0, 3 + 3 + 3 * 2)])
def test_the_reference_is_computed_once_for_all_engines(
    held: int, opened: int, llama: Model, text: Text, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to try each; then once per block, but for the one that is still open."""
    computed: list[int] = []
    folders_opened: list[Path] = []
    logits, open_engine = run.Reference.logits, run.open_engine

    def noted(self: run.Reference, sequence: int) -> Any:
        computed.append(sequence)
        return logits(self, sequence)

    monkeypatch.setattr(run, "HELD", held)
    monkeypatch.setattr(run.Reference, "logits", noted)
    monkeypatch.setattr(run, "open_engine", lambda folder: folders_opened.append(folder) or open_engine(folder))
    found = validate_engines({label: folders / label for label in LABELS}, llama, text)
    assert computed == [0, 1, 2, 3]
    assert len(folders_opened) == opened
    for validation in found:
        (alone,) = validate_engines({validation.label: folders / validation.label}, llama, text)
        assert replace(alone, samples=validation.samples) == validation
        assert alone.samples == validation.samples
