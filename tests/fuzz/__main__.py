"""`python -m tests.fuzz --minutes N`: damage what the tools read, and count what becomes of it."""

from __future__ import annotations

import argparse
import os
import sys

from transformers.utils import logging

from tests.fuzz.kinds import KINDS
from tests.fuzz.loop import OUTCOMES, attempt, fuzz, limit_memory, table, until


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--trials", type=int, help="of each kind, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind; may be given several times")
    parser.add_argument("--trial", type=int, help="repeat the trial of this number")
    given = parser.parse_args()
    os.environ["SMOOTHQUANT_CACHE"] = os.devnull  # no verdict is remembered
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    limit_memory()
    kinds = {name: KINDS[name] for name in given.only or KINDS}
    if given.trial is not None:
        for name, trial in kinds.items():
            print(f"{name} {given.trial}: {attempt(trial, name, given.seed, given.trial)}")
        return 0
    proceed = until(given.minutes) if given.trials is None else lambda number: number < given.trials
    reports = fuzz(kinds, given.seed, proceed)
    for name, report in reports.items():
        for number, outcome in report.defects:
            print(f"{name} {number}: {outcome.name}: {outcome.told}")
    print(*table(reports), sep="\n")
    return int(any(report.counts[name] for report in reports.values() for name, bad in OUTCOMES.items() if bad))


if __name__ == "__main__":
    sys.exit(main())
