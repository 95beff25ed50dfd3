"""Several processes of one command: the result of one process, one line for what goes wrong, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from act_scales.search.passes import Pass
from builders.validate.candidate import Candidate
from smoothquant import batches, workroom
from smoothquant.journal import work_folder
from smoothquant.layers import FloatLayer
from smoothquant.plan import layer_file
from smoothquant.sweep import Sweep
from smoothquant.workspace import Workspace
from tests.forked import smoothquant
from tests.models import TEXT, save_llama
from tests.team import environment, in_a_team
from tests.zoo import save

MONOTONOUS = TEXT[:1100] + "a" * 2200  # the second of two ranks has one token alone


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("ranks") / "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def calibrate(model: Path, text: Path, samples: int = 64) -> tuple[object, ...]:
    options = ("--samples", samples, "--length", 64, "--device", "cpu", "--json")
    return ("calibrate", model, "--text", text, *options)


def one_line(found: list[subprocess.CompletedProcess[str]], status: int, *said: str) -> None:
    """All have ended, and one has said why."""
    assert all(each.returncode for each in found), found
    lines = [line for each in found for line in each.stderr.splitlines() if line.startswith("smoothquant: ")]
    assert len(lines) == 1, found
    for part in said:
        assert part in lines[0]
    assert status in {each.returncode for each in found}, found
    assert not any("Traceback" in each.stderr for each in found), found


def keep_every_layer(_rank: int) -> None:
    workroom.KEEP_EVERY = -1.0


def killed_at(layer: int, rank: int) -> Callable[[int], None]:
    """Let one rank be killed as it comes to a layer, with the state kept after every layer before."""

    def set_up(mine: int) -> None:
        keep_every_layer(mine)
        run = Sweep.layer

        def dying(self: Sweep, source: object) -> None:
            if mine == rank and self.index == layer:
                os.kill(os.getpid(), signal.SIGKILL)
            run(self, source)

        Sweep.layer = dying  # type: ignore[method-assign, assignment]

    return set_up


@pytest.mark.parametrize("layout", ["llama", "mixtral", "falcon-40b", "gemma2"])
def test_calibrations_are_those_of_one_process(layout: str, llama: Path, tmp_path: Path) -> None:
    """Byte for byte: maxima, and sums as float32 holds them."""
    text = tmp_path / "text.txt"
    text.write_text(MONOTONOUS, encoding="utf-8")
    model = llama if layout == "llama" else save(layout, tmp_path / layout)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    alone = smoothquant(*calibrate(model, text), "--out", one)
    leader, follower = in_a_team(2, *calibrate(model, text), "--out", two)
    assert one.read_bytes() == two.read_bytes()
    assert (leader.returncode, follower.returncode) == (0, 0)
    assert leader.stdout.replace("two", "one") == alone.stdout
    assert follower.stdout + follower.stderr == ""
    if layout == "mixtral":  # experts are silent for the second rank, and not for both
        half = tmp_path / "half.txt"
        half.write_text("a" * 1100, encoding="utf-8")
        found = smoothquant(*calibrate(model, half, 16), "--out", tmp_path / "half.safetensors")
        assert json.loads(found.stdout)["silent"]
        assert not json.loads(leader.stdout)["silent"]


def test_a_rank_that_is_killed_ends_all_and_any_number_goes_on(llama: Path, text: Path, tmp_path: Path) -> None:
    one, out = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    smoothquant(*calibrate(llama, text), "--out", one)
    for rank, status in ((1, 4), (0, 4)):
        found = in_a_team(2, *calibrate(llama, text), "--out", out, set_up=killed_at(1, rank))
        assert found[rank].returncode == -signal.SIGKILL
        one_line(found, status, f"rank {1 - rank} has lost the other processes")
        assert not out.exists()
        assert work_folder(out).exists()
    found = in_a_team(3, *calibrate(llama, text), "--out", out)
    assert [each.returncode for each in found] == [0, 0, 0]
    assert one.read_bytes() == out.read_bytes()
    assert not work_folder(out).exists()


def assert_close(found: object, expected: object, place: str = "") -> None:
    """The same JSON values, numbers to 1e-9."""
    assert type(found) is type(expected), place
    if isinstance(found, dict) and isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in found.items():
            assert_close(value, expected[key], f"{place}.{key}")
    elif isinstance(found, list) and isinstance(expected, list):
        assert len(found) == len(expected), place
        for at, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{place}[{at}]")
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-15), place
    else:
        assert found == expected, place


def assert_same_files(found: Path, expected: Path) -> None:
    """The same bytes in every file."""
    names = [path.relative_to(expected) for path in expected.rglob("*") if path.is_file()]
    assert len(names) > 4
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_validations_are_those_of_one_process(llama: Path, text: Path, tmp_path: Path) -> None:
    """Also where they were interrupted between two sequences of an engine."""
    scales, engines = tmp_path / "scales.safetensors", (tmp_path / "onnx", tmp_path / "modelopt")
    smoothquant(*calibrate(llama, text), "--out", scales)
    for engine in engines:
        smoothquant("export", engine.name, llama, scales, "--out", engine)
    options = ("--samples", 40, "--length", 64, "--device", "cpu", "--exact", "--no-thresholds")
    command = ("validate", *engines, "--reference", llama, "--text", text, *options)
    one, two, again = (tmp_path / f"{name}.json" for name in ("one", "two", "again"))
    assert smoothquant(*command, "--out", one).returncode == 0
    found = in_a_team(2, *command, "--out", two, "--report", tmp_path / "report.html")
    assert [each.returncode for each in found] == [0, 0], found
    assert found[1].stdout + found[1].stderr == ""
    wanted, seen = (json.loads(path.read_text()) for path in (one, two))
    assert wanted.pop("sha256")  # of content that may have other last digits
    assert seen.pop("sha256")
    assert_close(seen, wanted)

    def dying(rank: int) -> None:
        keep_every_layer(rank)
        add = Candidate.add

        def die(self: Candidate, *arguments: object) -> None:
            if rank == 1 and self.compared == 7 and self.streamed:
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, *arguments)  # type: ignore[arg-type]

        Candidate.add = die  # type: ignore[method-assign]

    one_line(in_a_team(2, *command, "--out", again, set_up=dying), 4, "has lost the other processes")
    assert [each.returncode for each in in_a_team(2, *command, "--out", again)] == [0, 0]
    assert again.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("layout", ["llama", "mixtral"])
def test_plans_are_those_of_one_process(layout: str, llama: Path, tmp_path: Path) -> None:
    """Every file of them, byte for byte."""
    text = tmp_path / "text.txt"
    text.write_text(MONOTONOUS * 2, encoding="utf-8")
    model = llama if layout == "llama" else save(layout, tmp_path / layout)
    options = ("--samples", 96, "--length", 64, "--device", "cpu", "--lm-head", "int8", "--embedding", "int8")
    command = ("search", model, "--text", text, *options)
    assert smoothquant(*command, "--out", tmp_path / "one").returncode == 0
    assert [each.returncode for each in in_a_team(2, *command, "--out", tmp_path / "two")] == [0, 0]
    assert_same_files(tmp_path / "two", tmp_path / "one")


def test_a_search_that_was_killed_goes_on_with_two_processes(llama: Path, text: Path, tmp_path: Path) -> None:
    """One process leaves a state behind the first layer; two begin with the second."""
    options = ("--samples", 16, "--length", 64, "--device", "cpu", "--lm-head", "int8", "--embedding", "int8")
    command, out = ("search", llama, "--text", text, *options, "--out"), tmp_path / "out"

    def small_batches(rank: int) -> None:
        keep_every_layer(rank)
        batches.BATCH_TOKENS = 128  # two sequences: each rank has some of the text, and of what judges

    def die_at(index: int, *, once: Path = tmp_path) -> Callable[[int], None]:
        """Be killed as a layer is searched; once: a file that must be there."""

        def set_up(rank: int) -> None:
            small_batches(rank)
            take = Pass.take

            def dying(self: Pass, source: FloatLayer) -> object:
                if source.index == index and once.exists():
                    os.kill(os.getpid(), signal.SIGKILL)
                return take(self, source)

            Pass.take = dying  # type: ignore[method-assign, assignment]

        return set_up

    assert smoothquant(*command, tmp_path / "one", set_up=lambda: small_batches(0)).returncode == 0
    behind_the_first = die_at(1, once=work_folder(out) / "output" / layer_file(0))
    assert smoothquant(*command, out, set_up=lambda: behind_the_first(0)).returncode == -signal.SIGKILL
    found = in_a_team(2, *command, out, set_up=die_at(0))  # no trial, and no first layer, is done again
    assert [each.returncode for each in found] == [0, 0], found
    assert_same_files(out, tmp_path / "one")


def test_bad_input_is_one_line(llama: Path, text: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out.safetensors", tmp_path / "other.txt"
    other.write_text(TEXT[::-1], encoding="utf-8")
    good = (*calibrate(llama, text), "--out", out)
    one_line(in_a_team(3, *calibrate(llama, text, 2), "--out", out), 2, "2 samples for 3 processes")
    found = in_a_team(2, *good, of_rank={1: (*calibrate(llama, other), "--out", out)})
    one_line(found, 2, "rank 1 has other text_fingerprint than rank 0")
    found = in_a_team(2, *good, of_rank={1: (*good, "--dtype", "bfloat16")})
    one_line(found, 2, "rank 1 has other dtype than rank 0 (bfloat16, not float32)")
    found = in_a_team(2, *good, of_rank={1: (*calibrate(tmp_path / "nowhere", text), "--out", out)})
    one_line(found, 2, "nowhere")
    one_line(in_a_team(2, *good, "--device", "cuda:1"), 2, "--device cuda:1 for 2 processes")
    one_line(in_a_team(2, *good, "--memory", "2GB"), 2, "--memory 2GB for 2 processes")
    one_line(in_a_team(2, "recipes"), 2, "smoothquant recipes under torchrun")
    with Workspace(out, "calibrate", {"somebody": "else"}):
        one_line(in_a_team(2, *good), 2, "another process is writing it")
    assert not out.exists()


def test_a_shard_that_is_replaced_ends_all(text: Path, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")

    def set_up(rank: int) -> None:
        run = Sweep.embed

        def replacing(self: Sweep, *arguments: object) -> None:
            run(self, *arguments)  # type: ignore[arg-type]
            if rank == 1:
                os.utime(model / "model.safetensors")
            self.team.wait()

        Sweep.embed = replacing  # type: ignore[method-assign]

    found = in_a_team(2, *calibrate(model, text), "--out", tmp_path / "out.safetensors", set_up=set_up)
    one_line(found, 2, "model.safetensors was changed while it was read")


def test_another_tools_world_size_makes_no_ranks(llama: Path, text: Path, tmp_path: Path) -> None:
    """Kubernetes, SageMaker and mpirun set it for machines or processes of their own."""
    told = {name: value for name, value in environment(1, 2, 29500).items() if not name.startswith("TORCHELASTIC")}
    out = tmp_path / "out.safetensors"
    found = smoothquant(*calibrate(llama, text), "--out", out, set_up=lambda: os.environ.update(told))
    assert found.returncode == 0
    assert out.exists()


def test_torchrun(llama: Path, text: Path, tmp_path: Path) -> None:
    """The command that a user types."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "recipes.cli"]
    one, out = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    smoothquant(*calibrate(llama, text), "--out", one)
    words = [*torchrun, *map(str, calibrate(llama, text)), "--out", str(out)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 0, found.stderr
    assert one.read_bytes() == out.read_bytes()
    assert json.loads(found.stdout)["linears"] == 14
