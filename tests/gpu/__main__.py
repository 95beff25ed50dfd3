"""python -m tests.gpu [--device cuda] [TIER ...]: the tiers, and one table of what they found. Exit status 1 if a check
failed, 0 if none did, whatever could not be run."""

from __future__ import annotations

import argparse

from tests.gpu.outcomes import FAILED, table
from tests.gpu.tiers import TIERS, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tiers", nargs="*", metavar="TIER", help=f"of {', '.join(TIERS)} (default: all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: what can stand in for itself")
    given = parser.parse_args()
    unknown = set(given.tiers) - TIERS.keys()
    if unknown:
        parser.error(f"no tier {', '.join(sorted(unknown))}; expected {', '.join(TIERS)}")
    rows = run({name: tier for name, tier in TIERS.items() if name in (given.tiers or TIERS)}, given.device)
    print("\n" + table(rows))
    return int(any(outcome.verdict == FAILED for _, outcome in rows))


if __name__ == "__main__":
    raise SystemExit(main())
