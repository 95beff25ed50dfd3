"""Who may import whom: README.md, "Work on it"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("smoothquant", "act_scales", "exporters", "builders", "recipes")
SHARED = {"TritonPythonModel"}  # Triton wants this name in every model.py
SPELLED = {  # the scheme itself, and where TensorRT-LLM's own algorithms have a form
    "smoothquant/scheme.py",
    "builders/tensorrt_llm/format/tensors.py",
    "builders/tensorrt_llm/interpreter/interpreter.py",
}
INTERPRETER = "builders/tensorrt_llm/interpreter/interpreter.py"


def imported(path: Path) -> Iterator[str]:
    """What a file imports, wherever in it: modules, and names in modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_those_above(room: str) -> None:
    below = ROOMS[ROOMS.index(room) + 1 :]
    for path in (ROOT / room).rglob("*.py"):
        assert not [name for name in imported(path) if name.partition(".")[0] in (*below, "tests")], path


def test_a_manifest_is_read_by_its_fields() -> None:
    """No module takes what another one wrote by a key of its own spelling."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found = re.search(
                r"""manifest(\(.*\))?(\.inputs|\.results)?(\[|\.get\()""", path.read_text(encoding="utf-8")
            )
            assert found is None, (path, found)


def test_only_the_scheme_spells_its_words() -> None:
    """What is quantized, and how, is asked of the record: no module compares the words of its presets."""
    word = r"""["'](float|int8|int8-shared|per-token|per-tensor|per-channel|per-layer)["']"""
    compared = re.compile(rf"([!=]= |\bin ){word}|{word} [!=]= ")
    assert compared.search('if activations == "float":')  # the control
    found = {
        (str(path.relative_to(ROOT)), line.strip())
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if compared.search(line)
    }
    assert {file for file, _ in found} == SPELLED, found


def test_rules_of_the_tensorrt_llm_format_do_without_its_interpreter() -> None:
    for path in (ROOT / "builders/tensorrt_llm/format").glob("*.py"):
        assert not [name for name in imported(path) if "interpreter" in name], path


def test_scales_are_folded_in_one_place() -> None:
    """What multiplies columns, divides rows and is left to an engine is said by `smoothquant.fold` alone."""
    folding = re.compile(r"\.(row|smoother)\[[^]]*\] = |\.smoother \|= |\.divided\(scale\)")
    found = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if folding.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"smoothquant/fold.py", "smoothquant/norms.py"}  # a norm rounds itself


def file_of(name: str) -> Path | None:
    """Where a module of ours, or a name in one, is written."""
    for dotted in (name, name.rpartition(".")[0]):
        path = ROOT / dotted.replace(".", "/")
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if dotted and file.exists():
                return file
    return None


def test_the_interpreter_shares_no_code_with_the_exporter() -> None:
    """Nothing that it imports, and nothing that that imports, is the exporter's."""
    seen: set[Path] = set()
    waiting = [ROOT / INTERPRETER]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        names = set(imported(path))
        assert not [name for name in names if name.partition(".")[0] == "exporters"], path
        waiting += [file for file in map(file_of, names) if file is not None and file not in seen]
    assert ROOT / "builders/tensorrt_llm/interpreter/arithmetic.py" in seen


def modules() -> dict[str, Path]:
    """All modules of ours, by their dotted names."""
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    dotted = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in dotted.items()}


def named(path: Path) -> Iterator[str]:
    """Strings of a file: the table of engines imports the modules that it names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def packages(name: str) -> Iterator[str]:
    """A module, and the packages that importing it runs first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def test_modules_import_in_no_circle() -> None:
    """A module comes after all that it imports, wherever in it, and after the packages of what it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        found = [name if name in known else name.rpartition(".")[0] for name in imported(path)]
        found += [name for name in named(path) if name in known and "." in name]
        first = {package for name in found for package in packages(name)} - set(packages(module))
        graph[module] = (set(found) | first) & known.keys() - {module}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_a_public_class_has_a_name_of_its_own() -> None:
    """A name stands for one thing, wherever it is read."""
    places: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    shared = {name: found for name, found in places.items() if len(found) > 1 and name not in SHARED}
    assert not shared


WRITES = re.compile(
    r"""\bopen\([^)]*["'][rbt]*[wax+]|\.(write_text|write_bytes|touch|unlink|rmdir|mkdir|rename|symlink_to|hardlink_to)\("""
    r"""|os\.(replace|rename|link|symlink|unlink|remove|rmdir|mkdir|makedirs|truncate|ftruncate|pwrite)\("""
    r"""|shutil\.(copy|copyfile|copytree|copyfileobj|move|rmtree)\b|\b(save_file|TemporaryDirectory|NamedTemporaryFile)\("""
)


def test_one_module_changes_the_disk() -> None:
    """So every operation on files can be interrupted (`tests.crash`)."""
    writers = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if WRITES.search(path.read_text(encoding="utf-8"))
    }
    trains = "recipes/tiny_llama/train.py"  # makes the bundled model; no command runs it
    assert writers - {trains} == {"smoothquant/files.py"}
