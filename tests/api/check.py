"""Does code use TensorRT's Python API as a release has it? Two looks at it.

types    mypy, with the release's stubs: what is reached from `import tensorrt`
names    what mypy takes for Any: `trt`, also as an argument, is taken for the module, and a variable that is called as
         in NAMED for an object of that class
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.api.stubs import members, stubs

NAMED = {  # a variable of this name, also as an attribute, with or without _ -> its class
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "runtime": "Runtime",
}
TELLING = ("attr-defined", "call-arg", "name-defined")  # what stubs are exact in; not: types that convert themselves
ERROR = re.compile(r"(?P<where>[^:]+:\d+): error: (?P<what>.*?)\s+\[(?P<code>[a-z-]+)\]$")


def misuses(files: Iterable[Path], root: Path, release: str) -> list[str]:
    """What a release does not have: "builders/tensorrt/compiler.py:3: ...". files: below root."""
    names = [str(path.relative_to(root)) for path in files]
    return sorted({*_by_types(names, root, stubs(release)), *_by_names(names, root, stubs(release))})


def _by_types(files: list[str], root: Path, folder: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip", "--ignore-missing-imports"]
        command += ["--check-untyped-defs", "--explicit-package-bases", "--namespace-packages", "--no-error-summary"]
        command += ["--allow-redefinition", f"--cache-dir={scratch}", *files]
        environment = {**os.environ, "MYPYPATH": os.pathsep.join(map(str, (root, folder)))}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    for line in done.stdout.splitlines():
        found = ERROR.match(line)
        if found and found["code"] in TELLING and found["where"].rpartition(":")[0] in files:
            yield f"{found['where']}: {found['what']}"


def _by_names(files: list[str], root: Path, folder: Path) -> Iterator[str]:
    known = members(folder)
    for file in files:
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        if not any(_imports_tensorrt(node) for node in ast.walk(tree)):
            continue
        for node in ast.walk(tree):
            kind = NAMED.get(_name(node.value).lstrip("_")) if isinstance(node, ast.Attribute) else None
            if kind and node.attr not in known[kind] and not node.attr.startswith("__"):
                yield f'{file}:{node.lineno}: "{kind}" has no attribute "{node.attr}"'
        yield from _by_module(file, tree, known)


def _by_module(file: str, tree: ast.AST, known: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """What `trt.NAME` and `trt.CLASS.NAME` reach and the release does not have."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        path = ast.unparse(node).split(".")
        if path[0] != "trt" or path[-1].startswith("__"):
            continue
        if len(path) == 2 and path[1] not in known:
            yield f'{file}:{node.lineno}: Module has no attribute "{path[1]}"'
        elif len(path) == 3 and path[2] not in known.get(path[1], frozenset()):
            yield f'{file}:{node.lineno}: "type[{path[1]}]" has no attribute "{path[2]}"'


def _imports_tensorrt(node: ast.AST) -> bool:
    return isinstance(node, ast.Import) and any(name.name == "tensorrt" for name in node.names)


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""
