"""python -m tests.servers [NAME ...] [-- PYTEST OPTION ...]: make the environments of servers, and run the tests that
need them. A run of all tests of a server is kept for the documents (tests/benchmarks/results/servers.json).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from smoothquant.files import write_json
from tests.benchmarks.results import FOLDER, machine
from tests.servers.environments import ENVIRONMENTS


class Outcomes:
    """A pytest plugin. rows: what tests have recorded of a server; failed: whether any test failed."""

    def __init__(self) -> None:
        self.rows: dict[str, list[list[str]]] = {name: [] for name in ENVIRONMENTS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, row in report.user_properties:
                self.rows[name].append(row)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ENVIRONMENTS)} (default: all)")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    names, options = parser.parse_args(given[:cut]).names or list(ENVIRONMENTS), given[cut + 1 :]
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"{unknown[0]}: expected one of {', '.join(ENVIRONMENTS)}")
    for name in names:
        ENVIRONMENTS[name].make()
    tests, outcomes = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names], Outcomes()
    status = pytest.main(["-m", "server", *tests, *options], plugins=[outcomes])
    if status == 0 and names == list(ENVIRONMENTS) and not options:
        requirements = {name: list(ENVIRONMENTS[name].requirements) for name in names}
        content = {
            "command": "python -m tests.servers",
            "machine": machine(),
            "requirements": requirements,
            "rows": outcomes.rows,
        }
        write_json(FOLDER / "servers.json", content)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
