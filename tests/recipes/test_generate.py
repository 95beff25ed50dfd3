"""`generate` in a process of its own: without torch and transformers, and with every token as it comes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy
import pytest

from act_scales.tokenizer import Encoder
from builders import openvino
from builders.onnxruntime import OnnxRuntimeEngine
from exporters.export import Source, export
from recipes import tiny_llama
from smoothquant.settings import SmoothingSettings
from tests.forked import assert_one_line
from tests.models import hooked_absmax, open_llama, sample_ids, save_llama
from tests.writers import onnx_writer

PROMPT = "def main(): é"
BARE = "import sys\nfor name in ('torch', 'transformers', 'safetensors', 'onnx'): sys.modules[name] = None\n"
COMMAND = "from recipes.cli import main\nsys.exit(main(sys.argv[1:]))"
LOGITS = """
import numpy
from builders.engine.table import open_engine
decoding = open_engine(sys.argv[1]).start(range(100))
tiny = numpy.float32(1e-40)
print(decoding.logits.tobytes().hex(), tiny * numpy.float32(1) == tiny)
"""
WAITING = """
from builders.onnxruntime import OnnxRuntimeEngine
def generate(self, prompt, **options):
    for token in prompt:
        yield token
        sys.stdin.readline()
OnnxRuntimeEngine.generate = generate
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    model = save_llama(root / "model")
    source = Source(open_llama(model), SmoothingSettings(), hooked_absmax(model, sample_ids()), {"model": "m"})
    export(source, [onnx_writer(root / "engine")])
    return root / "engine"


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_tokens_are_the_same_without_torch(runtime: str, engine: Path, tmp_path: Path) -> None:
    folder = engine
    if runtime == "openvino":
        openvino.build(engine, folder := tmp_path / "engine")
    found = python(BARE + COMMAND, "generate", folder, PROMPT, "--max-new-tokens", 24, "--json", "--quiet")
    assert (found.returncode, found.stderr) == (0, "")
    encoder = Encoder(engine)
    ids = list(chain(*encoder.whole([PROMPT])))
    said = json.loads(found.stdout)
    assert said["tokens"] == list(OnnxRuntimeEngine(engine).generate(ids, 24))
    assert said["text"] == encoder.decode(said["tokens"])


def test_the_logits_are_the_same_without_torch(engine: Path) -> None:
    """And the thread that made the first session of its process counts subnormal numbers again."""
    found = python(BARE + LOGITS, engine)
    assert found.returncode == 0, found.stderr
    expected = OnnxRuntimeEngine(engine).start(range(100)).logits
    assert expected.dtype == numpy.float32
    assert found.stdout.split() == [expected.tobytes().hex(), "True"]


def test_a_command_that_needs_torch_says_so(tmp_path: Path) -> None:
    text = ("--text", tiny_llama.CALIBRATION_TEXT, "--out", tmp_path / "scales.safetensors")
    found = python(BARE + COMMAND, "calibrate", tiny_llama.PATH, *text)
    assert_one_line(found, 3, "the package torch is not installed; pip install 'smoothquant-toolchain[convert]'")


def test_every_token_is_shown_before_the_next(engine: Path) -> None:
    """The engine here waits until its last token was read; half of a character waits for the rest."""
    command = [sys.executable, "-c", f"{BARE}{WAITING}{COMMAND}", "generate", str(engine), PROMPT, "--quiet"]
    with subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().decode() == f"[14 tokens] {PROMPT}\n"
        for character in PROMPT:
            process.stdin.write(b"\n" * (len(character.encode()) - 1))
            assert process.stdout.read(99).decode() == character
            process.stdin.write(b"\n")
        assert process.stdout.read() == b"\n"
    assert process.returncode == 0
