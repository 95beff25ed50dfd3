"""Writes the generated parts of the README from results/*.json:  python -m tests.benchmarks.tables [--check]

A part lies between `<!-- generated: NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit status
is 1 if the README is not what the results make.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.benchmarks.results import FOLDER

README = Path(__file__).parents[2] / "README.md"
ORDER = ("engine_speed", "export_memory", "calibration_speed", "demo")
PACKAGES = ("torch", "onnxruntime", "transformers", "llmcompressor")


def main() -> None:
    text = README.read_text(encoding="utf-8")
    made = text
    for name, part in (("demo", demo()), ("benchmarks", benchmarks())):
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        made = pattern.sub(lambda match, part=part: f"{match[1]}{part}{match[2]}", made)
    if "--check" in sys.argv:
        sys.exit(0 if made == text else "README.md is not what results/ make: python -m tests.benchmarks.tables")
    README.write_text(made, encoding="utf-8")


def demo() -> str:
    """What the demonstration printed."""
    output = result("demo")["details"]["output"]
    lines = [line.rstrip() for line in output.splitlines()]
    return "```\n" + "\n".join(lines).strip("\n") + "\n```\n"


def benchmarks() -> str:
    """A table with a line per measurement, and under it where and how they were made."""
    lines = ["| | measured | target |", "|---|---|---|"]
    notes = []
    for name in ORDER:
        found = result(name)
        lines += [f"| {row['what']} | {row['measured']} | {row['target']} |" for row in found["rows"]]
        versions = ", ".join(
            f"{package} {found['versions'][package]}" for package in PACKAGES if package in found["versions"]
        )
        machine = found["machine"]
        where = f"{machine['processor']}, {machine['cores']} cores, {', '.join(machine['features'][:3])}"
        notes.append(f"* `{found['command']}` ({where}; {versions})")
    return "\n".join([*lines, "", *notes]) + "\n"


def result(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
