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
from pathlib import Path

from tests.crash import preload
from tests.crash.harness import Harness
from tests.crash.scenarios import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--scenario", action="append", choices=tuple(SCENARIOS), help="(default: all)")
    parser.add_argument("--sample", type=int, metavar="N", help="points of each scenario (default: every point)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the sample (default 0)")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="K", help="losses of power at every operation (default 1)"
    )
    parser.add_argument("--lying", action="store_true", help="forget what was synced: there must be faults")
    arguments = parser.parse_args()
    preload()
    faults, total, began = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        harness = Harness(Path(folder).resolve(), lying=arguments.lying)
        harness.prepare()
        for name in arguments.scenario or SCENARIOS:
            points = list(harness.points(name, arguments.seeds))
            if arguments.sample and arguments.sample < len(points):
                points = random.Random(f"{arguments.seed}{name}").sample(points, arguments.sample)
            found: Counter[str] = Counter()
            for point in points:
                fault = harness.fault(point)
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


if __name__ == "__main__":
    sys.exit(main())
