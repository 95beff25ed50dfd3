"""Every command on a terminal that knows ASCII alone, with no standard input, and with nobody who reads.

A command that is not in the table fails a test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.cli import parser
from tests.builders.serving.tensorrt_llm.test_serve_config import engine as trtllm_engine
from tests.forked import nobody_reads, smoothquant
from tests.models import TEXT, save_llama

ROOT = Path(__file__).parents[2]

FEW = ("--samples", "2", "--length", "32")
TO_S = ("--out", "out.safetensors")
TO = ("--out", "out")
SEVERAL = "export --target w8a8 --target onnx:act=both,dtype=fp16 --target trtllm:pp=2"  # a form of export
COMMANDS: dict[str, tuple[str, ...]] = {
    "estimate": ("model", "--samples", "2", "--length", "32"),
    "calibrate": ("model", "--text", "text.txt", *FEW, *TO_S),
    "search": ("model", "--text", "text.txt", "--samples", "4", "--length", "16", *TO),
    "export hf": ("model", "scales.safetensors", *TO),
    "export w8a8": ("model", "scales.safetensors", *TO),
    "export modelopt": ("model", "scales.safetensors", *TO),
    "export onnx": ("model", "scales.safetensors", *TO),
    "export trtllm": ("model", "scales.safetensors", *TO),
    SEVERAL: ("model", "scales.safetensors", *TO),
    "convert": ("int8", "--to", "compressed-tensors", *TO),
    "check": ("onnx",),
    "build onnxruntime": ("onnx", *TO),
    "build openvino": ("onnx", *TO),
    "build tensorrt": ("onnx", *TO),
    "build tensorrt-llm": ("trtllm", *TO),
    "validate": ("onnx", "--reference", "model", "--text", "text.txt", *FEW, "--report", "r.html", "--out", "r.json"),
    "compare": ("model", "onnx", "--text", "text.txt", *FEW),
    "generate": ("onnx", "Once", "--max-new-tokens", "16", "--temperature", "9"),
    "serve": ("--help",),  # itself ends when it is told to: tests/builders/serving/openai
    "serve-config": ("trtllm-engine", *TO),
    "run": ("llama", "--model", "model", "--text", "text.txt", *FEW, "--target", "w8a8", *TO),
    "recipes": (),
    "reproduce": ("llama-2-7b", "--model", "model", "--scales", "scales.safetensors", "--text", "text.txt", *FEW, *TO),
    "demo": ("--help",),  # itself takes a minute, and is a test of its own
    "scales list": (),
    "scales show": ("scales.safetensors",),
    "scales pull": ("nothing", *TO_S),
    "scales import": ("scales.safetensors", "--model", "model", *TO_S),
    "scales convert": ("scales.safetensors", "--out", "out.pt"),
    "doctor": (),
}
MISSING = {"build tensorrt": 3, "build tensorrt-llm": 3, "scales pull": 2}  # status for want of a GPU, or of a name
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
WIDE = {"PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an input for every command."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model")
    trtllm_engine(folder / "trtllm-engine")
    (folder / "text.txt").write_text(f"né 漢字 {TEXT}", encoding="utf-8")
    needed = (
        ("calibrate", "scales.safetensors"),
        ("export onnx", "onnx"),
        ("export trtllm", "trtllm"),
        ("export modelopt", "int8"),
    )
    made = {name: [*name.split(), *COMMANDS[name][:-1], out, "--quiet"] for name, out in needed}
    assert {name: found["status"] for name, found in forked(made, folder).items()} == dict.fromkeys(made, 0)
    return folder


def copied(place: Path, folder: Path) -> Path:
    """A folder with the same inputs."""
    for path in place.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def forked(commands: dict[str, list[str]], folder: Path, **environment: str) -> dict[str, Any]:
    """What commands say in a folder: they are forked from a process in this environment."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-m", "tests.forked"]
    found = subprocess.run(
        words, cwd=folder, env=env, input=json.dumps(commands).encode(), capture_output=True, timeout=600, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def narrow(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every command says on a terminal that knows ASCII alone."""
    commands = {}
    for name, words in COMMANDS.items():
        folder = copied(place, tmp_path_factory.mktemp("narrow"))
        paths = {
            word: str(folder / word) for word in words if (folder / word).exists() or word.startswith(("out", "r."))
        }
        commands[name] = [*name.split(), *(paths.get(word, word) for word in words)]
    return forked(commands, place, **ASCII)


def names(given: argparse.ArgumentParser, before: str = "") -> Iterator[str]:
    """All commands, and the commands of commands."""
    inner = [action for action in given._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for name, found in action.choices.items():
            yield from names(found, f"{before} {name}".strip())
    if not inner:
        yield before


def test_the_table_is_whole() -> None:
    assert {*names(parser()), SEVERAL} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_narrow_terminal(name: str, narrow: dict[str, Any]) -> None:
    found = narrow[name]
    status, said = MISSING.get(name, 0), found["error"]
    assert "Traceback" not in said
    assert found["status"] == status or (name == "doctor" and found["status"] <= 1), said
    assert (found["out"] + said).isascii()
    assert bool(found["out"]) == (status == 0)


def test_a_wide_terminal(place: Path) -> None:
    """The control: there the model's words are no ASCII."""
    found = forked({"generate": ["generate", *COMMANDS["generate"]]}, place, **WIDE)
    assert not found["generate"]["out"].isascii()


@pytest.mark.parametrize("name", COMMANDS)
def test_nobody_reads(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied(place, tmp_path))
    found = smoothquant(*name.split(), *COMMANDS[name], set_up=nobody_reads)
    assert "Traceback" not in found.stderr
    assert found.returncode == MISSING.get(name, 141), found.stderr
