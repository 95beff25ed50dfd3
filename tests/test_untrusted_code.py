"""No line of the project lets a model folder bring Python code, or tells a user to.

Read from the syntax: every call that loads something from a folder says `trust_remote_code=False`, and every call of
`torch.load` says `weights_only=True`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("act_scales", "builders", "exporters", "recipes", "smoothquant", "docker")
SAFE = (("trust_remote_code", "from_pretrained", False), ("weights_only", "torch.load", True))  # option, call, value


def calls(source: str) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Names of what is called, and the keyword arguments; a method that is kept under a name counts by that name."""
    tree = ast.parse(source)
    kept = {
        ast.unparse(target): node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Attribute)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            yield (f"{owner}.{name}" if owner == "torch" else kept.get(name, name)), keywords


def faults(source: str) -> list[str]:
    found = []
    for name, keywords in calls(source):
        for wanted, call, value in SAFE:
            given = keywords.get(wanted)
            said = given.value if isinstance(given, ast.Constant) else None
            if (name == call and said is not value) or (given is not None and said is not value):
                found.append(f"{name}({wanted}={'' if given is None else ast.unparse(given)})")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_brings_code(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert faults(path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    "source",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=trusted)",
        "load: Any = AutoModel.from_pretrained\nload(folder, dtype=x)",
        "load_dataset(name, trust_remote_code=True)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
    ],
)
def test_the_test_finds_them(source: str) -> None:
    assert len(faults(source)) == 1


def test_nobody_is_told_to_trust() -> None:
    """In no text of the project, for people or for shells."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".md", ".sh", ".toml", ".yaml", ".jinja"):
                text = path.read_text(encoding="utf-8").replace(" ", "").lower()
                assert "weights_only=false" not in text, path
                assert "trust_remote_code=true" not in text, path
                assert "trust-remote-code" not in text, path
