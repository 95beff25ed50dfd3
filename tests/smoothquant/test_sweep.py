"""The loop over layers: what transformers computes, whatever is in memory, and wherever it was interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from smoothquant import batches, hidden, sweep, workroom
from smoothquant.errors import CheckpointError, OutputError
from smoothquant.journal import work_folder
from smoothquant.layers import FloatLayer, Layer, float_layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.sweep import FLOAT
from smoothquant.workspace import Workspace
from tests.models import open_llama, sample_ids

LENGTHS = (40, 40, 40, 7, 40, 1, 23, 23)
FORM = "same"


class Seen(Listener):
    """Sums of every linear's output, a second form of the layers that is the first in float64, and how far they are
    apart after each layer."""

    forms = {FORM: torch.float64}  # noqa: RUF012

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.apart: list[Tensor] = []

    def enter(self, source: FloatLayer) -> dict[str, Layer]:
        self._heard: dict[str, Tensor] = {}
        self._index, self._apart = source.index, torch.zeros(())
        return {FORM: source}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        self._heard[role] = self._heard.get(role, torch.zeros(y.shape[-1])) + y.flatten(0, -2).sum(0)

    def advance(self, hidden: dict[str, Tensor]) -> None:
        self._apart = torch.maximum(self._apart, (hidden[FORM] - hidden[FLOAT]).abs().max().float())

    def leave(self) -> None:
        self.sums |= {f"{self._index}.{role}": self._heard.pop(role) for role in list(self._heard)}
        self.apart.append(self._apart)

    @property
    def leftover(self) -> list[str]:
        return list(self._heard)

    def state(self) -> dict[str, Tensor]:
        return {"apart": torch.stack(self.apart), **self.sums}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.apart = list(state.pop("apart"))
        self.sums = {name: state.pop(name) for name in list(state)}


@pytest.fixture
def model(make_llama: Callable[..., Path]) -> Model:
    return open_llama(make_llama(num_hidden_layers=4))


@pytest.fixture
def sequences() -> list[Tensor]:
    return [sample_ids(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]


@pytest.fixture(params=["memory", "mapped"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(hidden, "IN_MEMORY", 0 if request.param == "mapped" else 1 << 30)
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0)  # after every layer
    return request.param


def run(model: Model, sequences: list[Tensor], out: Path, **options: object) -> tuple[dict[str, Tensor], Seen]:
    """All that a sweep gives: hidden states by form and sequence, and what was heard."""
    seen = Seen()
    with Workspace(out, "test", {}) as work:
        end = sweep.sweep(model, sequences, [seen], work=work, **options)
        states = {f"{form} {n}": end.states(n, form).clone() for form in (FLOAT, FORM) for n in range(len(sequences))}
    return states | seen.sums | {"apart": torch.stack(seen.apart)}, seen


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_hidden_states_are_those_of_transformers(
    model: Model, sequences: list[Tensor], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of all lengths, batches of several and of one; a layer at the wrong place shows."""
    monkeypatch.setattr(batches, "BATCH_TOKENS", 80)
    theirs = LlamaForCausalLM.from_pretrained(model.checkpoint.folder, dtype=torch.float64)
    expected: list[Tensor] = []
    theirs.model.layers[-1].register_forward_hook(lambda module, args, output: expected.append(output[0]))
    with torch.no_grad():
        for ids in sequences:
            theirs(ids[None])

    def off(order: Callable[[int], int]) -> float:
        monkeypatch.setattr(
            sweep, "float_layer", lambda model, n, *rest, **more: _at(float_layer(model, order(n), *rest, **more), n)
        )
        found, _ = run(model, sequences, tmp_path / str(order(0)))
        wide = [found[f"{FORM} {n}"] for n in range(len(sequences))]
        return max((mine - true).abs().max().item() for mine, true in zip(wide, expected, strict=True))

    assert off(lambda n: n) < 1e-5  # angles of the rotary embedding are float32 numbers in both
    assert off(lambda n: 3 - n) > 0.1


def _at(layer: FloatLayer, index: int) -> FloatLayer:
    return FloatLayer(index, layer.weights, layer.biases, layer.norms)


def test_mapped_files_are_as_good_as_memory(
    model: Model, sequences: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for budget in (1 << 30, 0):
        monkeypatch.setattr(hidden, "IN_MEMORY", budget)
        found.append(run(model, sequences, tmp_path / str(budget))[0])
        files = sorted(path.name for path in work_folder(tmp_path / str(budget)).glob("scratch.*"))
        sides = [f"scratch.hidden.{form}.{side}" for form in (FLOAT, FORM) for side in (0, 1)]
        assert files == ([] if budget else sides)
    assert same(*found)


def test_small_pieces_of_the_embedding(
    model: Model, sequences: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(model, sequences, tmp_path / "whole")
    monkeypatch.setattr(sweep, "EMBEDDED", 3000)
    assert same(run(model, sequences, tmp_path / "pieces")[0], whole)


class Interrupt(KeyboardInterrupt):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("moment", ["advance", "leave", "progress"])
@pytest.mark.parametrize("stop", range(4))
def test_an_interrupted_sweep_goes_on_to_the_same_numbers(
    stop: int, moment: str, model: Model, sequences: list[Tensor], where: str, tmp_path: Path
) -> None:
    """At every layer: in the middle of it, when it is done, and when that was noted."""
    whole, _ = run(model, sequences, tmp_path / "whole")

    class Stopping(Seen):
        def advance(self, hidden: dict[str, Tensor]) -> None:
            super().advance(hidden)
            if moment == "advance" and self._index == stop and hidden[FLOAT].shape[1] == 7:
                raise Interrupt

        def leave(self) -> None:
            super().leave()
            if moment == "leave" and self._index == stop:
                raise Interrupt

    def progress(done: int, total: int) -> None:
        if moment == "progress" and done == stop + 1:
            raise Interrupt

    with pytest.raises(Interrupt), Workspace(tmp_path / "out", "test", {}) as work:
        sweep.sweep(model, sequences, [Stopping()], work=work, keep_last=True, progress=progress)
    told: list[int] = []
    again, _ = run(model, sequences, tmp_path / "out", progress=lambda done, total: told.append(done))
    assert told[0] == stop + (moment == "progress")
    assert same(again, whole)


def flip(path: Path, place: int = -4) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


FAULTS = {"lost": Path.unlink, "cut off": lambda path: os.truncate(path, path.stat().st_size - 8), "flipped": flip}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("damaged", "start"), [((), 4), ((0,), 3), ((0, 1), 0)])
def test_a_damaged_state_is_told_and_not_used(
    fault: str,
    damaged: tuple[int, ...],
    start: int,
    model: Model,
    sequences: list[Tensor],
    where: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The states of two marks are there: without the last one, the sweep goes on from the one before; without both, it
    starts again. It ends with the same numbers in any case. (No damage: the control.)"""
    whole, _ = run(model, sequences, tmp_path / "whole", keep_last=True)
    assert same(run(model, sequences, tmp_path / "out", keep_last=True)[0], whole)
    for side in damaged:
        name = f"scratch.hidden.same.{side}" if where == "mapped" else f"state.layer.{4 - side}.safetensors"
        FAULTS[fault](work_folder(tmp_path / "out") / name)
    caplog.clear()
    told: list[int] = []
    again, _ = run(model, sequences, tmp_path / "out", progress=lambda done, total: told.append(done))
    assert told[0] == start
    assert same(again, whole)
    notes = [f"{tmp_path / 'out'}: {note}" for note in NOTES[: len(damaged)][-1:]]
    assert [record.getMessage() for record in caplog.records] == notes


NOTES = (
    "the last state of an interrupted run is damaged; it goes on from the one before",
    "what an interrupted run left is damaged; it starts again",
)


def test_what_no_listener_knows_is_an_error(model: Model, sequences: list[Tensor], where: str, tmp_path: Path) -> None:
    run(model, sequences, tmp_path / "out", keep_last=True)
    with Workspace(tmp_path / "out", "test", {}) as work, pytest.raises(KeyError, match=r"0\.apart"):
        sweep.sweep(model, sequences, [], work=work)


def test_what_a_listener_leaves_over_is_an_error(model: Model, sequences: list[Tensor], tmp_path: Path) -> None:
    class Forgetful(Seen):
        def leave(self) -> None:
            if self._index == 2:
                self._heard = {"up": self._heard["up"]}
            else:
                super().leave()

    with pytest.raises(CheckpointError, match="layer 2: statistics of up that belong to no matrix"):
        sweep.sweep(model, sequences, [Forgetful()])


def test_a_disk_without_room_is_told_at_once(
    model: Model, sequences: list[Tensor], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("smoothquant.workroom.shutil.disk_usage", lambda folder: free)
    with pytest.raises(OutputError, match="free on this disk"):
        run(model, sequences, tmp_path / "out")
    assert not [path for path in os.listdir(work_folder(tmp_path / "out")) if path.startswith("scratch")]


def test_a_listener_may_hear_the_first_tokens_alone(model: Model, sequences: list[Tensor]) -> None:
    """It finds there what it finds in a sweep over these sequences, and others hear all."""
    few, all_of_them, alone = Seen(), Recorder(), Seen()
    few.tokens = 3 * 40 + 1  # reaches into the batch of the fourth sequence
    end = sweep.sweep(model, sequences, [few, all_of_them])
    sweep.sweep(model, sequences[:4], [alone])
    assert few.sums.keys() == alone.sums.keys()
    for name, found in few.sums.items():
        torch.testing.assert_close(found, alone.sums[name])
    assert end.hidden.before(0, FORM).shape[0] == sum(LENGTHS[:4])
    assert all_of_them.tokens_heard == model.geometry.layers * sum(LENGTHS)


class Recorder(Listener):
    """Counts the tokens that it hears."""

    tokens_heard = 0

    def advance(self, hidden: dict[str, Tensor]) -> None:
        self.tokens_heard += hidden[FLOAT].flatten(0, -2).shape[0]
