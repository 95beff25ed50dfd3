"""Type stubs of TensorRT's Python module, of any release, made from the module itself; no GPU, no TensorRT.

The binding modules on PyPI (1.3 MB each) hold the whole API; only the libraries under it are elsewhere. With empty
libraries of their names the module imports, and mypy's stubgen reads its signatures. Stubs and modules stay in a cache
outside the repository: they are NVIDIA's.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

RELEASES = {  # what is checked against, each a package of PyPI
    "10.1": "tensorrt_cu12_bindings==10.1.0",
    "10.16": "tensorrt_cu13_bindings==10.16.1.11",
    "11.0": "tensorrt_cu13_bindings==11.0.0.114",
    "11.4": "tensorrt_cu13_bindings==11.4.0.106",
}
MODULE = "tensorrt_bindings"
FUNCTIONS = """
    createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParser_INTERNAL
    createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry
    initLibNvInferPlugins
"""  # what the module takes from the libraries
FROM_PYTHON = """
__version__: str
def volume(iterable: Any) -> int: ...
def nptype(trt_type: Any) -> Any: ...
"""  # what the package around the module adds


class UnavailableError(Exception):
    """No stubs can be made here, and why."""


def stubs(release: str) -> Path:
    """A folder with tensorrt/__init__.pyi of a release. Raises UnavailableError."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoothquant-tests"
    folder = home / f"stubs-{RELEASES[release].replace('==', '-')}"
    if not (folder / "tensorrt/__init__.pyi").exists():
        with tempfile.TemporaryDirectory() as scratch:
            made = _make(RELEASES[release], Path(scratch))
            home.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(dir=home))  # other test processes may be at the same
            shutil.copytree(made, new / "tensorrt")
            try:
                os.replace(new, folder)
            except OSError:
                shutil.rmtree(new)
    return folder


def _make(requirement: str, scratch: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise UnavailableError("no C compiler, for empty libraries")
    if not shutil.which("stubgen", path=Path(sys.executable).parent):
        raise UnavailableError("no stubgen: pip install mypy")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    pip += ["--retries", "1", "--timeout", "20", "--dest", str(scratch), requirement]
    _run(pip, f"no package index gives {requirement}")
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
    shutil.rmtree(scratch / MODULE / "plugin", ignore_errors=True)  # wants the package tensorrt
    libraries = set(re.findall(rb"lib(?:nvinfer|nvinfer_plugin|nvonnxparser)\.so\.\d+", _binary(scratch).read_bytes()))
    source = scratch / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS.split()))
    for name in map(bytes.decode, libraries):
        library = str(scratch / name)
        _run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", library, str(source)], "the C compiler fails")
    stubgen = str(Path(sys.executable).with_name("stubgen"))
    environment = {"LD_LIBRARY_PATH": str(scratch), "PYTHONPATH": str(scratch)}
    command = [stubgen, "--inspect-mode", "--quiet", "-m", f"{MODULE}.tensorrt", "-o", str(scratch / "out")]
    _run(command, "stubgen fails", environment)
    (scratch / "tensorrt").mkdir()
    text = (scratch / "out" / MODULE / "tensorrt.pyi").read_text(encoding="utf-8")
    (scratch / "tensorrt/__init__.pyi").write_text(_mended(text), encoding="utf-8")
    return scratch / "tensorrt"


def _binary(folder: Path) -> Path:
    return next((folder / MODULE).glob("tensorrt*.so"))


def _mended(text: str) -> str:
    """TensorRT has a data type called bool: in signatures Python's is meant. And some signatures are not Python's."""
    text = "\n".join(map(_definition, text.splitlines())) + "\n"
    text = re.sub(r"(?<=[\[ ,|])bool(?=[\] ,|:\n]|$)(?!: DataType)", "builtins.bool", text)
    return f"import builtins\n{text}{FROM_PYTHON}"


def _definition(line: str) -> str:
    """A line; a function whose parameters are in an order that Python has not takes any."""
    try:
        if line.lstrip().startswith("def "):
            ast.parse(line.strip())
    except SyntaxError:
        line = re.sub(r"\(.*\) ->", "(self, *args, **kwargs) ->", line)
    return line


def _run(command: list[str], otherwise: str, environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise UnavailableError(f"{otherwise} ({(done.stderr or done.stdout).strip().splitlines()[-1:]})")


@cache
def members(folder: Path) -> Mapping[str, frozenset[str]]:
    """The attributes of every class in a folder of stubs, inherited ones too."""
    tree = ast.parse((folder / "tensorrt/__init__.pyi").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def of(name: str) -> set[str]:
        if name not in classes:
            return set()
        found = {
            target.id if isinstance(target, ast.Name) else ""
            for node in classes[name].body
            if isinstance(node, ast.AnnAssign)
            for target in (node.target,)
        }
        found |= {node.name for node in classes[name].body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        bases = (base.id for base in classes[name].bases if isinstance(base, ast.Name))
        return found.union(*map(of, bases))

    return {name: frozenset(of(name)) for name in classes}
