"""The serving image, by the steps of its own Dockerfile, and a container of it: read-only, without a network, not root.

OpenAI's client asks, SageMaker's start is tried, the health check is the image's own, and SIGTERM ends it.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGTERM
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI

from recipes import tiny_llama
from tests.builders.serving.conftest import TEMPLATE
from tests.docker.dockerfile import stages
from tests.forked import smoothquant
from tests.servers.container import Container, Image, nbytes, running
from tests.servers.environments import DEBIAN

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make namespaces and change its root"),
    pytest.mark.skipif(DEBIAN.python is None, reason="python -m tests.servers container makes its root file system"),
]
ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker/onnxruntime/Dockerfile"
LARGEST = 600_000_000  # bytes of the image
TURNS: list[Any] = [{"role": "user", "content": "Say it."}]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("image")
    folder.chmod(0o755)
    yield Image(DEBIAN, folder / "root", ROOT, stages(DOCKERFILE.read_text(encoding="utf-8"))["serve"])
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the bundled model, with a chat template."""
    folder = tmp_path_factory.mktemp("engine")
    model = shutil.copytree(tiny_llama.PATH, folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    scales, text = folder / "act_scales.safetensors", tiny_llama.CALIBRATION_TEXT
    for words in (
        ("calibrate", model, "--text", text, "--samples", 4, "--length", 64, "--out", scales),
        ("export", "onnx", model, scales, "--out", folder / "onnx"),
        ("build", "onnxruntime", folder / "onnx", "--attention", "grouped", "--out", folder / "engine"),
    ):
        said = smoothquant(*words)
        assert said.returncode == 0, said.stderr
    return folder / "engine"


def healthy(container: Container) -> bool:
    return container.execute(container.image.health).returncode == 0


def kept(container: Container) -> list[str]:
    """The files that were written, all of them into /tmp."""
    return container.execute(["find", "/tmp", "-type", "f"]).stdout.split()


def test_what_is_in_the_image(image: Image, record_property: Record) -> None:
    base, whole = nbytes(DEBIAN.folder), nbytes(image.root)
    debian = image.inside("/etc/debian_version").read_text().strip()
    asked = ["chroot", DEBIAN.folder, "python3", "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    record_property("container", [f"Debian {debian} with {version} and pip", f"{base / 1e6:.0f} MB"])
    record_property(
        "container", ["the image's steps in it, all together", f"{whole / 1e6:.0f} MB (600 wanted at most)"]
    )
    assert base + 50_000_000 < whole <= LARGEST
    packages = {path.name.partition("-")[0].lower() for path in image.root.rglob("*.dist-info")}
    assert {"onnxruntime", "tokenizers", "fastapi", "uvicorn", "smoothquant_toolchain"} <= packages
    assert not {"torch", "transformers", "safetensors", "onnx"} & packages
    assert not list(image.root.rglob("libtorch*"))
    record_property("container", ["PyTorch, transformers", "none"])
    assert re.fullmatch(r"[1-9]\d*", image.user)


def test_a_container_serves(image: Image, engine: Path, record_property: Record) -> None:
    begin = time.monotonic()
    keys = {"SMOOTHQUANT_API_KEYS": "first,second", "SMOOTHQUANT_OPTIONS": "--max-batch 4 --max-context 200"}
    with running(image, "--name", "tiny", mounts={engine: "/engine"}, given=keys) as container:
        seconds = time.monotonic() - begin
        status = Path(f"/proc/{container.pid}/status").read_text()
        assert re.search(rf"^Uid:\s+{image.user}\s", status, re.MULTILINE)
        assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)  # the server itself is the first process
        for path in ("/engine/x", "/opt/x", "/etc/x"):
            assert "Read-only file system" in container.execute(["touch", path], user="0").stderr
        assert container.execute(["touch", "/tmp/x"]).returncode == 0  # the control
        assert container.execute(["rm", "/tmp/x"]).returncode == 0
        assert healthy(container)
        assert all(path.startswith("/tmp/.cache/smoothquant/digests/") for path in kept(container))
        with container.network():
            server = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="second", max_retries=0, timeout=60)
            with pytest.raises(AuthenticationError):
                server.with_options(api_key="third").models.list()
            [model] = server.models.list().data
            assert (model.id, model.model_dump()["max_model_len"]) == ("tiny", 200)
            greedy: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24}
            whole = server.completions.create(prompt="def main(", **greedy).choices[0].text
            stream = iter(server.completions.create(prompt="def main(", stream=True, **greedy))
            parts = [next(stream).choices[0].text]
            chat = server.chat.completions.create(messages=TURNS, **greedy)
            assert chat.choices[0].message.content
            os.kill(container.pid, SIGTERM)
            parts += [chunk.choices[0].text for chunk in stream]
            assert "".join(parts) == whole
        assert container.process.wait(20) == 0
        assert container.process.stderr is not None
        assert container.process.stderr.read() == "stopped\n"
    record_property(
        "container",
        ["`docker run --read-only --tmpfs /tmp -v ENGINE:/engine:ro`", f"user {image.user}, ready in {seconds:.1f} s"],
    )
    record_property(
        "container", ["HEALTHCHECK; OpenAI's client, texts and chats; SIGTERM", "healthy; answers; status 0"]
    )


def test_sagemaker_starts_it(image: Image, engine: Path, tmp_path: Path, record_property: Record) -> None:
    """`docker run IMAGE serve`, with what serve-config wrote in /opt/ml/model, and requests on port 8080."""
    out = tmp_path / "out"
    said = smoothquant("serve-config", engine, "--for", "sagemaker", "--name", "tiny", "--out", out)
    assert said.returncode == 0, said.stderr
    given = json.loads((out / "create-model.json").read_text())["PrimaryContainer"]["Environment"]
    given["ORT_DISABLE_TELEMETRY"] = "0"  # the control of what is kept
    with running(image, "serve", mounts={out / "model": "/opt/ml/model"}, given=given) as container:
        assert healthy(container)
        with container.network(), httpx.Client(base_url="http://127.0.0.1:8080", timeout=60) as client:
            assert client.get("/ping").status_code == 200
            answer = client.post("/invocations", json={"prompt": "def main(", "max_tokens": 4})
            assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
            with client.stream("POST", "/invocations", json={"messages": TURNS, "max_tokens": 4, "stream": True}) as it:
                assert list(it.iter_lines())[-2:] == ["data: [DONE]", ""]
            assert client.post("/invocations", json={"inputs": "a"}).status_code == 400
        assert any(path.endswith("/onnxruntime.db") for path in kept(container))
        os.kill(container.pid, SIGTERM)
        assert container.process.wait(20) == 0
    record_property(
        "container", ["`serve-config --for sagemaker`, `docker run IMAGE serve`", "`/ping`, `/invocations`; status 0"]
    )


def test_a_container_that_cannot_serve(image: Image, tmp_path: Path) -> None:
    """One line, and a status. An unhealthy one is seen."""
    (empty := tmp_path / "empty").mkdir(mode=0o755)
    (private := tmp_path / "private").mkdir(mode=0o700)
    none = "no such folder; mount an engine there: -v ENGINE:"
    for arguments, mounts, status, line in (
        ((), {}, 2, f"smoothquant-serve: /engine: {none}/engine:ro"),
        (("serve",), {}, 2, f"smoothquant-serve: /opt/ml/model: {none}/opt/ml/model:ro"),
        ((), {empty: "/engine"}, 2, "smoothquant: /engine: not an output of this tool"),
        ((), {private: "/engine"}, 4, "smoothquant: /engine/smoothquant/manifest.json: no permission"),
    ):
        process = image.start(arguments, mounts, {})
        said = process.communicate(timeout=60)[1]
        assert (process.returncode, said[: len(line)], said.count("\n")) == (status, line, 1)
    idle = copy.copy(image)
    idle.entrypoint = ["/bin/sh", "-c", "echo no server; exec sleep 60"]
    with running(idle, mounts={}) as container:
        assert not healthy(container)
