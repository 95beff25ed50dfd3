"""Interrupts a scenario at an operation, lets it go on, and compares what is there with an undisturbed run.

Every run is a process of its own, forked from one that has imported everything, so that a run takes a fraction of a
second. The folder of a scenario holds a file of the user's: that it stays is compared, too. Where processes share a
run, the disk of rank 0 is interrupted, and the others must end for that.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from smoothquant import files
from smoothquant.errors import LostRankError, UserError
from smoothquant.outputs import OURS, check_content, is_output, load_manifest
from tests.crash.disk import DIED, CountingDisk, DyingDisk, FailingPower
from tests.crash.scenarios import SCENARIOS, Scenario
from tests.team import environment

MINE = {"thesis.txt": b"all my work\n", "out.partial/thesis.txt": b"more of it\n"}
GIVEN = Scenario("given", ())
GIVEN_FILES = {"SCALES": "scales.safetensors", "TEXT": "text.txt", "HELDOUT": "heldout.txt"}
KINDS = ("killed", "torn", "power")


@dataclass(frozen=True)
class Point:
    """An interruption. kind: of KINDS; at: operation, counted from 0; seed: of the states after a loss of power."""

    scenario: str
    kind: str
    at: int
    seed: int = 0


class Harness:
    """Scenarios in a folder. root: an empty folder for everything. lying: the disk forgets what was synced."""

    def __init__(self, root: Path, *, lying: bool = False) -> None:
        self.lying = lying
        self.root, self.given = root, root / "given"
        self.place, self.base, self.left = root / "place", root / "base", root / "left"
        os.environ["SMOOTHQUANT_CACHE"] = str(root / "cache")
        self._counted: dict[str, list[str]] = {}
        self._whole: dict[str, dict[str, bytes]] = {}

    def prepare(self) -> None:
        """Make the models, the text and the exports that scenarios start from."""
        self.given.mkdir(parents=True)
        _must(self._forked(self._make_models, files.Disk()))
        export = ("MODEL", "SCALES", "--out")
        for command in (
            ("calibrate", "MODEL", "--text", "TEXT", "--samples", "4", "--length", "16", "--out", "SCALES"),
            ("export", "onnx", *export, "ONNX", "--kv", "int8"),
            ("export", "trtllm", *export, "TRTLLM"),
            ("export", "modelopt", *export, "INT8"),
            ("convert", "INT8", "--to", "compressed-tensors", "--out", "CONVERTED"),  # remembers digests of INT8
        ):
            _must(self._command(GIVEN, command, files.Disk()))

    def operations(self, name: str) -> list[str]:
        """The operations of an undisturbed run, in their order. What it makes is remembered."""
        if name not in self._counted:
            scenario = SCENARIOS[name]
            self._reset(scenario)
            log = self.root / "operations"
            _must(self._command(scenario, scenario.command, CountingDisk(), log, ranks=scenario.ranks))
            self._counted[name] = log.read_text().split()
            self._whole[name] = self._contents()
        return self._counted[name]

    def points(self, name: str, seeds: int = 2) -> Iterator[Point]:
        """Every interruption of a scenario. seeds: states after a loss of power, at each operation."""
        for at, operation in enumerate(self.operations(name)):
            yield Point(name, "killed", at)
            if operation == "write":
                yield Point(name, "torn", at)
            for seed in range(seeds):
                yield Point(name, "power", at, seed)

    def fault(self, point: Point) -> str:
        """What went wrong at an interruption; "" if the run that followed ended as if nothing had happened."""
        scenario = SCENARIOS[point.scenario]
        self.operations(point.scenario)
        self._reset(scenario)
        if point.kind == "power":
            disk: DyingDisk = FailingPower(self.place, point.at, point.seed, lying=self.lying)
        else:
            disk = DyingDisk(point.at, torn=point.kind == "torn")
        status = self._command(scenario, scenario.command, disk, ranks=scenario.ranks)
        if status != DIED:
            return f"status {status} instead of an interruption"
        if fault := self._half_made(scenario):
            return fault
        _replace(self.left, self.place)
        for ranks in scenario.resumed:
            if ranks != scenario.resumed[0]:
                _replace(self.place, self.left)
            status = self._command(scenario, scenario.command, files.Disk(), ranks=ranks)
            if status:
                error = (self.root / "stderr").read_text()[-300:]
                return f"the next run, of {ranks} processes, ends with status {status}: {error}"
            if difference := _difference(self._whole[point.scenario], self._contents()):
                return f"{difference} (the next run: {ranks} processes)"
        return ""

    def _half_made(self, scenario: Scenario) -> str:
        """What is wrong with outputs between the two runs: each is whole, the old one or the new one, or absent."""
        for out in self._outputs(self.place):
            try:
                if (self.place / out).is_dir():
                    check_content(self.place / out, load_manifest(self.place / out))
            except UserError as error:
                return f"after the interruption: {error}"
        for old in self._outputs(self.base / scenario.name):
            if not (self.place / old).exists():
                return f"after the interruption neither the old {old} nor the new one is there"
        return ""

    def _outputs(self, folder: Path) -> list[Path]:
        """The outputs in a scenario's folder, by their paths in it."""
        found = [path for path in folder.rglob("*") if path.is_dir() and path.name != OURS and is_output(path)]
        return [path.relative_to(folder) for path in (*found, *folder.glob("*.safetensors")) if _is_named(path)]

    def _reset(self, scenario: Scenario) -> None:
        """The folder of a scenario, before its command."""
        base = self.base / scenario.name
        if not base.exists():
            base.mkdir(parents=True)
            for name, content in MINE.items():
                (base / name).parent.mkdir(exist_ok=True)
                (base / name).write_bytes(content)
            if scenario.before:
                _replace(self.place, base)
                _must(self._command(scenario, scenario.before, files.Disk()))
                _replace(base, self.place)
        _replace(self.place, base)

    def _contents(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.place)): path.read_bytes() for path in self.place.rglob("*") if path.is_file()
        }

    def _command(
        self, scenario: Scenario, command: Sequence[str], disk: files.Disk, log: Path | None = None, ranks: int = 1
    ) -> int:
        """Run the command line in processes of its own. Returns the exit status of rank 0, which has the disk; that of
        another one that neither ends as it should."""
        words = [str(self.given / GIVEN_FILES.get(word, word)) if word.isupper() else word for word in command]

        def run() -> int:
            from recipes.cli import main
            from smoothquant import batches, digests, hidden, workroom

            workroom.KEEP_EVERY = -1.0  # keep the state after every layer
            digests.GRAIN = 0  # remember every digest, however soon: else operations depend on the machine's pace
            hidden.IN_MEMORY = 0 if scenario.mapped else hidden.IN_MEMORY
            batches.BATCH_TOKENS = scenario.batch or batches.BATCH_TOKENS
            self.place.mkdir(exist_ok=True)
            os.chdir(self.place)
            status = main([*words, "--quiet"])
            if log and files.DISK is disk:
                log.write_text("\n".join(disk.names))  # type: ignore[attr-defined]
            return status

        return self._forked(run, disk) if ranks == 1 else self._shared(run, disk, ranks)

    def _shared(self, run: Callable[[], int], disk: files.Disk, ranks: int) -> int:
        """Do some work in processes that share it. Returns what `_command` does."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))

        def member(rank: int) -> Callable[[], int]:
            def work() -> int:
                os.environ.update(environment(rank, ranks, store.port))
                return run()

            return work

        others = [self._start(member(rank), files.Disk(), f".{rank}") for rank in range(1, ranks)]
        status = self._forked(member(0), disk)
        wanted = 0 if status == 0 else LostRankError.exit_code
        return next((ended for ended in map(_end, others) if ended != wanted), status)

    def _make_models(self) -> int:
        from tests.models import TEXT, save_llama

        save_llama(self.given / "MODEL", num_hidden_layers=2, hidden_size=64)
        (self.given / GIVEN_FILES["TEXT"]).write_text(TEXT)
        (self.given / GIVEN_FILES["HELDOUT"]).write_text(TEXT[:128])
        return 0

    def _forked(self, work: Callable[[], int], disk: files.Disk) -> int:
        """Do some work in a process of its own, on a disk. Returns its exit status."""
        return _end(self._start(work, disk))

    def _start(self, work: Callable[[], int], disk: files.Disk, suffix: str = "") -> int:
        """Begin some work in a process of its own, on a disk. Returns its number. suffix: of its streams' files."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        status = 99
        try:
            for stream, number in (("stdout", 1), ("stderr", 2)):
                os.dup2(os.open(self.root / f"{stream}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            gc.freeze()  # a collection would go through all that the imports have made, and copy it
            import torch

            torch.set_num_threads(1)
            files.DISK = disk
            status = work()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _end(child: int) -> int:
    """The exit status of a process, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _replace(folder: Path, other: Path) -> None:
    """Make a folder a copy of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(other, folder)


def _must(status: int) -> None:
    assert status == 0, status


def _is_named(path: Path) -> bool:
    return not any(part.endswith("-work") for part in path.parts)


def _difference(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    if lost := sorted(expected.keys() - found.keys()):
        return f"lost: {', '.join(lost)}"
    if more := sorted(found.keys() - expected.keys()):
        return f"left over: {', '.join(more)}"
    other = sorted(name for name in expected if expected[name] != found[name])
    return f"other content: {', '.join(other)}" if other else ""
