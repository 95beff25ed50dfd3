"""python -m tests.crash: interrupt the command line at every operation on files, or at some.

Prints one line per scenario and one per fault; exit status 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from tests.crash.harness import Harness, Point
from tests.crash.scenarios import SCENARIOS
from tests.forked import preload


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--scenario", action="append", choices=tuple(SCENARIOS), help="(default: all)")
    parser.add_argument("--sample", type=int, metavar="N", help="points of each scenario (default: every point)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the sample (default 0)")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="K", help="losses of power at every operation (default 1)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="interruptions at a time (default 1)")
    parser.add_argument("--lying", action="store_true", help="forget what was synced: there must be faults")
    arguments = parser.parse_args()
    preload()
    faults, total, began = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash-") as folder, _jobs(folder, arguments) as (harness, tried):
        for name in arguments.scenario or SCENARIOS:
            points = list(harness.points(name, arguments.seeds))
            if arguments.sample and arguments.sample < len(points):
                points = random.Random(f"{arguments.seed}{name}").sample(points, arguments.sample)
            found: Counter[str] = Counter()
            for point, fault in tried(points):
                found[point.kind] += 1
                if fault:
                    faults += 1
                    print(f"  {point}: {fault}", flush=True)
            total += len(points)
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
            print(
                f"{name}: {len(harness.operations(name))} operations, {kinds}; {time.monotonic() - began:.0f} s",
                flush=True,
            )
    print(f"{total} interruptions, {faults} faults, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


@contextmanager
def _jobs(
    folder: str, arguments: argparse.Namespace
) -> Iterator[tuple[Harness, Callable[[list[Point]], Iterator[tuple[Point, str]]]]]:
    """A harness that counts, and what tries points: one after another, or in processes with a harness each."""
    harness = _prepared(folder, arguments.lying)
    if arguments.jobs == 1:
        yield harness, lambda points: ((point, harness.fault(point)) for point in points)
        return
    with get_context("fork").Pool(arguments.jobs, _begin, (folder, arguments.lying)) as pool:
        yield harness, lambda points: pool.imap_unordered(_try, points)


def _prepared(folder: str, lying: bool) -> Harness:
    harness = Harness(Path(tempfile.mkdtemp(dir=folder)).resolve(), lying=lying)
    harness.prepare()
    return harness


def _begin(folder: str, lying: bool) -> None:
    """Prepare a process that tries points."""
    global HARNESS
    HARNESS = _prepared(folder, lying)


def _try(point: Point) -> tuple[Point, str]:
    return point, HARNESS.fault(point)


HARNESS: Harness  # of a process that tries points


if __name__ == "__main__":
    sys.exit(main())
