"""python -m tests.servers [NAME ...] [-- PYTEST OPTION ...]: make the environments of servers, and run the tests that
need them. What a whole run found is kept: in builders/readers/runs.json for the table of readers, and in
tests/benchmarks/results/servers.json for the documents.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from builders.readers import READERS
from builders.readers.devices import this_cpu
from builders.readers.runs import FILE
from smoothquant.files import write_json
from smoothquant.reading import read_json
from tests.benchmarks.results import FOLDER, machine
from tests.servers.environments import ENVIRONMENTS

COMMAND = "python -m tests.servers"
RESULTS = FOLDER / "servers.json"


class Outcomes:
    """A pytest plugin. runs: of readers, as in runs.json; rows: what other tests have recorded, by server."""

    def __init__(self) -> None:
        self.runs: list[dict] = []
        self.rows: dict[str, list[list[str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, found in report.user_properties:
                if name == "run":
                    self.runs.append({"version": READERS[found["reader"]].version, "device": this_cpu().name} | found)
                else:
                    self.rows.setdefault(name, []).append(found)

    def keep(self, names: list[str]) -> None:
        """Put what was found into the files, in place of what the same servers did on a device of this kind."""
        made = {(run["reader"], run["device"]) for run in self.runs}
        kept = [run for run in read_json(FILE).get("runs", []) if (run["reader"], run["device"]) not in made]
        write_json(FILE, {"command": COMMAND, "runs": kept + self.runs})
        results = read_json(RESULTS)
        for name in names:
            requirements = [one for environment in ENVIRONMENTS[name] for one in environment.requirements]
            found = {"requirements": requirements, "machine": machine(), "rows": self.rows.get(name, [])}
            results[name] = {"command": f"{COMMAND} {name}"} | found
        write_json(RESULTS, results)


def main() -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ENVIRONMENTS)} (default: all)")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    names, options = parser.parse_args(given[:cut]).names or list(ENVIRONMENTS), given[cut + 1 :]
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"{unknown[0]}: expected one of {', '.join(ENVIRONMENTS)}")
    for name in names:
        for environment in ENVIRONMENTS[name]:
            environment.make()
    folder, outcomes = Path(__file__).parent, Outcomes()
    tests = [str(path) for name in names for path in sorted(folder.glob(f"test_{name.replace('-', '_')}*.py"))]
    status = pytest.main(["-m", "server", *tests, *options], plugins=[outcomes])
    if status == 0 and not options:
        outcomes.keep(names)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
