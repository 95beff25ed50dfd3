"""The demonstration, run from scratch as the README's first command runs it: how long it takes, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from tests.benchmarks.results import Row, publish


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "recipes.cli", "demo", "--quiet", "--out", "smoothquant-demo"]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - begin
    output = done.stdout.replace(f"{scratch}/", "")
    publish("demo", [Row("smoothquant demo, from scratch", f"{seconds:.0f} s", "<= 120 s")], {"output": output})


if __name__ == "__main__":
    main()
