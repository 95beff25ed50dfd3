"""The two folders that `serve-config --for sagemaker` writes, asked the same: that of the engine by our server, that of
the W8A8 folder by vLLM, whose own server answers SageMaker too. vLLM's options are those of serving.properties."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from recipes import tiny_llama
from smoothquant.reading import read_json
from tests.builders.serving.conftest import TEMPLATE
from tests.builders.serving.openai.served import served
from tests.forked import smoothquant
from tests.servers.environments import VLLM
from tests.servers.test_vllm_docs import wait_for

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(VLLM.python is None, reason="python -m tests.servers vllm makes vLLM's environment"),
]
PASSED_ON = ("served_model_name", "max_model_len")  # options of LMI that are vLLM's own
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Say it."}], "max_tokens": 8, "temperature": 0}
COMPLETION: dict[str, Any] = {"prompt": "def main(", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both."""
    folder = tmp_path_factory.mktemp("sagemaker")
    model = shutil.copytree(tiny_llama.PATH, folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    scales, text = folder / "act_scales.safetensors", ("--text", tiny_llama.CALIBRATION_TEXT, "--samples", 8)
    handed = ("--for", "sagemaker", "--name", "tiny", "--max-length", 128)
    for words in (
        ("calibrate", model, *text, "--length", 128, "--out", scales),
        ("export", "w8a8", model, scales, "--out", folder / "w8a8"),
        ("export", "onnx", model, scales, "--out", folder / "onnx"),
        ("serve-config", folder / "w8a8", *handed, "--out", folder / "gpu"),
        ("serve-config", folder / "onnx", *handed, "--out", folder / "cpu"),
    ):
        said = smoothquant(*words)
        assert said.returncode == 0, said.stderr
    return folder


@contextmanager
def vllm(folder: Path) -> Iterator[str]:
    """vLLM over a folder for LMI, with the options that LMI hands on; its address."""
    lines = (folder / "serving.properties").read_text().splitlines()
    options = {key.removeprefix("option."): value for key, _, value in (line.partition("=") for line in lines)}
    words = [word for name in PASSED_ON for word in (f"--{name.replace('_', '-')}", options[name])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM.python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--enforce-eager", *words]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (
        (folder.parent / "log").open("w") as log,
        subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | quiet,
            stdout=log,
            stderr=log,
        ) as server,
    ):
        try:
            wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def answers(root: str) -> list[Any]:
    """What a server makes of the same requests: statuses, and the forms of answers."""
    found: list[Any] = []
    with httpx.Client(base_url=root, timeout=120) as client:
        found.append(client.get("/ping").status_code)
        for body in (CHAT, COMPLETION, CHAT | {"model": "tiny"}, COMPLETION | {"model": "tiny"}):
            answer = client.post("/invocations", json=body)
            found.append((answer.status_code, answer.json().get("object"), answer.json().get("model")))
        for body in (CHAT, COMPLETION):
            with client.stream("POST", "/invocations", json=body | {"stream": True}) as answer:
                lines = [line for line in answer.iter_lines() if line]
                found.append((answer.status_code, lines[-1], all(line.startswith("data: ") for line in lines)))
        for body in ({}, COMPLETION | {"max_tokens": 1000}, COMPLETION | {"temperature": "warm"}):
            found.append(client.post("/invocations", json=body).status_code)
        found.append(
            client.post("/invocations", content=b"{", headers={"Content-Type": "application/json"}).status_code
        )
    return found


def test_vllm_and_our_server_answer_alike(written: Path) -> None:
    request = read_json(written / "cpu/create-model.json")
    options = shlex.split(request["PrimaryContainer"]["Environment"]["SMOOTHQUANT_OPTIONS"])
    with served(written / "cpu/model", *options) as server:
        ours = answers(server.root)
    assert ours[1][:2] == (200, "chat.completion")
    with vllm(written / "gpu/model") as root:
        assert answers(root) == ours
