"""Every line that installs something: documents, shell scripts, Dockerfiles, and what the tool itself prints.

A line ends where its requirements end, at the first word that is neither one nor an option of pip. What a hint fills in
while it runs is found where it comes from: packages of `require`, rows of `doctor`, environments of tests/servers.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement

from recipes import abilities
from tests.servers.environments import ALL, RootFileSystem

ROOT = Path(__file__).parents[2]
ROOMS = ("smoothquant", "act_scales", "exporters", "builders", "recipes")
INSTALL = re.compile(r"\bpip3? install +(?=((?:\\\n|[^\n`])+))")
WORD = re.compile(r""""[^"]*"|'[^']*'|[^\s"']+""")
LOCAL = re.compile(r"\.(\[[\w,-]+\])?")
OURS = "smoothquant-toolchain"  # not on an index: a hint adds an extra to what is installed
ALONE = {
    "-e",
    "--editable",
    "-U",
    "--upgrade",
    "-q",
    "--quiet",
    "--no-deps",
    "--no-cache-dir",
    "--break-system-packages",
}
VALUED = {"-c", "--constraint", "--target"}


@dataclass(frozen=True)
class Line:
    """requirements: sorted; "." with its extras is this project. pinned: whether constraints.txt holds. alone: whether
    what they require is left out."""

    requirements: tuple[str, ...]
    pinned: bool = False
    alone: bool = False

    def __str__(self) -> str:
        options = "-c constraints.txt " * self.pinned + "--no-deps " * self.alone
        return options + shlex.join(self.requirements)


@dataclass(frozen=True)
class Found:
    """A line and the file that has it."""

    line: Line
    file: str


def parse(text: str) -> Line | None:
    """The line behind "pip install"; None where nothing of it is known before it runs."""
    requirements, options, words = [], set(), iter(WORD.findall(re.sub(r"\\\n", " ", text)))
    for raw in words:
        word = raw.strip("'\"").rstrip(",;:")
        if word in VALUED:
            options.add((word, next(words)))
        elif word in ALONE:
            options.add(word)
        elif _is_requirement(word):
            requirements.append(word.replace(OURS, "."))
        else:
            break
        if raw[-1] in ",;:":
            break
    pinned = ("-c", "constraints.txt") in options
    return Line(tuple(sorted(requirements)), pinned, "--no-deps" in options) if requirements else None


def _is_requirement(word: str) -> bool:
    if LOCAL.fullmatch(word):
        return True
    try:
        Requirement(word)
    except InvalidRequirement:
        return False
    return True


def all_lines() -> Iterator[Found]:
    for path in _texts():
        for text in INSTALL.findall(path.read_text(encoding="utf-8")):
            yield from _found(text, path)
    for path in _sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for text in _strings(tree, path):
            for found in INSTALL.findall(text):
                yield from _found(found, path)
        for package in _required(tree, path):
            yield from _found(package, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abilities, "_version", lambda package: None)
        for ability in abilities.examine().abilities:
            for text in INSTALL.findall(ability.how):
                yield from _found(text, ROOT / "recipes/abilities.py")
    for server in ALL:
        if isinstance(server, RootFileSystem):
            continue  # of Debian's packages
        line = Line(tuple(sorted(server.requirements)), alone=server.alone)
        yield Found(line, "tests/servers/environments.py")


def _found(text: str, path: Path) -> Iterator[Found]:
    line = parse(text)
    if line:
        yield Found(line, str(path.relative_to(ROOT)))


def _texts() -> list[Path]:
    """Documents, shell scripts and Dockerfiles."""
    documents = [path for path in ROOT.rglob("*.md") if not re.search(r"/\.|/shared/", str(path.relative_to(ROOT)))]
    scripts = [path for folder in ("docker", "tests") for path in (ROOT / folder).rglob("*.sh")]
    return sorted(
        [*documents, *scripts, *(ROOT / "docker").glob("*/Dockerfile"), ROOT / ".ci/run", ROOT / "constraints.txt"]
    )


def _sources() -> list[Path]:
    """Our modules, and those of the tests that are no tests themselves: what they hold is printed, or told."""
    ours = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    helpers = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    return sorted([*ours, *(path for path in helpers if path.parent != Path(__file__).parent)])


def _strings(tree: ast.Module, path: Path) -> Iterator[str]:
    """All strings of a module; in place of what a string is given while it runs, a brace, which ends a line."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            if "pip install" not in ast.unparse(node):
                continue
            parts = [part.value if isinstance(part, ast.Constant) else _value(part.value, path) for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def _value(node: ast.expr, path: Path) -> str:
    """What a module's own constant says."""
    if not isinstance(node, ast.Name):
        return "{"
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return str(getattr(module, node.id, "{"))


def _required(tree: ast.Module, path: Path) -> Iterator[str]:
    """What `require` tells to install where a package is missing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            given = [*node.args[2:], *(word.value for word in node.keywords if word.arg == "package"), node.args[0]][0]
            package = given.value if isinstance(given, ast.Constant) else _value(given, path)
            yield str(package).partition(".")[0]
