"""The command itself: how it starts, how it stops, and clients that go."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from builders.serving.openai.app import Server
from builders.serving.openai.service import ServingLimits, open_service
from smoothquant.artifacts.card import CARD, measured
from smoothquant.outputs import MANIFEST, load_manifest, save_manifest
from tests.builders.serving.openai.served import SLOW, Process, served
from tests.forked import assert_one_line, in_a_new_process, smoothquant

README = Path(__file__).parents[4] / "README.md"
LONG: dict[str, Any] = {"model": "engine", "prompt": "def main(", "temperature": 0, "max_tokens": 60}
MEASURED = """On 16,384 tokens of a text with the fingerprint 0406634d7ec770af, against the original checkpoint:

| | |
|---|---|
| perplexity | 25.062, 24.938 for the model (+0.50%) |
| KL to the model, nats per token | mean 0.00466, 99th percentile 0.0341 |
| top-1 agreement | 96.08% |
"""


@pytest.fixture(scope="module")
def slow(engine: Path) -> Iterator[Process]:
    """A server with room for one answer under way and one that waits."""
    with served(engine, "--max-batch", "1", "--max-queue", "1", "--timeout", "1.5", before=SLOW) as found:
        yield found


def running(server: Process) -> tuple[float, float]:
    """The numbers of jobs under way, and of those that wait."""
    lines = httpx.get(f"{server.root}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("smoothquant_jobs"))
    return float(values["smoothquant_jobs_running"]), float(values["smoothquant_jobs_waiting"])


def wait_until(server: Process, expected: tuple[float, float]) -> float:
    """The seconds until so many jobs are there."""
    begin = time.monotonic()
    while running(server) != expected:
        assert time.monotonic() - begin < 5
        time.sleep(0.01)
    return time.monotonic() - begin


def test_what_the_readme_says(engine: Path, tmp_path: Path) -> None:
    found = re.search(r"<!-- serve -->\n```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    install, serve, ask = found[1].splitlines()
    assert install == 'pip install ".[serve]"'
    assert serve == "smoothquant serve model-engine &"
    (tmp_path / "model-engine").symlink_to(engine)
    with served(tmp_path / "model-engine", "--max-context", "90") as server:
        typed = ask.replace("http://127.0.0.1:8000", server.root)
        said = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, timeout=60, check=True).stdout
    *chunks, last = [line.removeprefix("data: ") for line in said.splitlines() if line]
    assert last == "[DONE]"
    assert len(chunks) > 3
    assert json.loads(chunks[0])["choices"][0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(stream: bool, slow: Process) -> None:
    wait_until(slow, (0, 0))
    host, port = slow.root.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(slow, (1, 0))
    assert wait_until(slow, (0, 0)) < 0.5  # of the 1.2 s that the answer would take
    assert 'finished_total{reason="cancelled"}' in httpx.get(f"{slow.root}/metrics").text


def test_a_full_queue(slow: Process) -> None:
    wait_until(slow, (0, 0))
    client = slow.client()
    with client.completions.create(stream=True, **LONG) as first:
        next(iter(first))
        second = threading.Thread(target=client.completions.create, kwargs={**LONG, "max_tokens": 1})
        second.start()
        wait_until(slow, (1, 1))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**LONG)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "queue_full"
        with pytest.raises(openai.BadRequestError, match="at most 1 answers"):  # never, so no reason to come again
            client.completions.create(n=2, **LONG)
    second.join(10)
    assert not second.is_alive()


def test_an_answer_that_takes_too_long(slow: Process) -> None:
    wait_until(slow, (0, 0))
    client = slow.client()
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**{**LONG, "max_tokens": 400})
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    stream = client.completions.create(stream=True, **{**LONG, "max_tokens": 400})
    with pytest.raises(openai.APIError, match="longer than this server"):
        assert len(list(stream)) < 400


def test_a_signal_finishes_what_runs(engine: Path) -> None:
    with served(engine, before=SLOW) as server:
        client = server.client()
        whole = client.completions.create(**{**LONG, "max_tokens": 40}).choices[0].text
        stream = iter(client.completions.create(stream=True, **{**LONG, "max_tokens": 40}))
        text = next(stream).choices[0].text
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.root}/ready").status_code == 200:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**LONG)
        assert caught.value.status_code == 503
        assert httpx.get(f"{server.root}/health").status_code == 200
        assert httpx.get(f"{server.root}/ping").status_code == 503
        assert text + "".join(chunk.choices[0].text for chunk in stream) == whole
        assert server.process.wait(10) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""


def test_a_second_signal_ends_what_runs(engine: Path) -> None:
    with served(engine, "--host", "0.0.0.0", before=SLOW) as server:
        stream = iter(server.client().completions.create(stream=True, **{**LONG, "max_tokens": 400}))
        next(stream)
        server.process.send_signal(signal.SIGINT)
        while httpx.get(f"{server.root}/ready").status_code == 200:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="this server stops"):
            list(stream)
        assert server.process.wait(5) == 0
        assert server.process.stderr is not None
        [warning] = server.process.stderr.read().splitlines()
        assert warning.startswith("warning: --host 0.0.0.0 without --api-key-env")


def test_nothing_is_told_or_kept_of_who_asks(engine: Path, tmp_path: Path) -> None:
    """ONNX Runtime's telemetry is off, which leaves a number of the machine and what it could not send in the home
    (with ORT_DISABLE_TELEMETRY=0, it does: tests/servers/test_container.py). On CI it is off by itself."""
    home = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    with served(engine, before="import os\nos.environ.pop('CI', None)\n", env=home) as server:
        server.client().completions.create(**LONG)
        found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert found <= {"smoothquant"}  # digests of files


def test_a_port_in_use(engine: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = in_a_new_process("serve", engine, "--port", port)
        assert_one_line(found, 2, f"--port {port}: another program listens there; choose another --port")


def test_starts_that_are_refused(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", " , ")
    for words, said in (
        (("--port", "70000"), "--port 70000; expected a number from 0 to 65535"),
        (("--host", "nowhere.invalid"), "no such address"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1"),
        (("--api-key-env", "NOT_SET"), "--api-key-env NOT_SET: no key in it"),
        (("--api-key-env", "EMPTY"), "--api-key-env EMPTY: no key in it"),
        (("--max-batch", "0"), "--max-batch 0; expected 1 or more"),
        (("--max-context", "513"), "at most 512"),
        (("--timeout", "nan"), "--timeout nan"),
    ):
        assert_one_line(smoothquant("serve", engine, "--port", "0", *words), 2, said)
    assert_one_line(smoothquant("serve", tmp_path, "--port", "0"), 2, "not an output of this tool")


def test_an_engine_that_was_changed(engine: Path, tmp_path: Path) -> None:
    """Every file is read; with --fast-start, those that changed since."""
    copy = shutil.copytree(engine, tmp_path / "engine")
    name = next(name for name in load_manifest(copy).files if name.endswith(".data"))
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    for words in ((), ("--fast-start",)):
        assert_one_line(smoothquant("serve", copy, "--port", "0", *words), 2, f"{name}: its content is not what")


def without(engine: Path, copy: Path, word: str) -> Path:
    """A copy of an engine that never had the files with a word in their names."""
    shutil.copytree(engine, copy)
    manifest = load_manifest(copy)
    kept = {name: facts for name, facts in manifest.files.items() if word not in name}
    for name in manifest.files.keys() - kept.keys():
        (copy / name).unlink()
    save_manifest(copy / MANIFEST, replace(manifest, files=kept))
    return copy


def test_an_engine_without_a_tokenizer(engine: Path, tmp_path: Path) -> None:
    copy = without(engine, tmp_path / "engine", "token")
    assert_one_line(smoothquant("serve", copy, "--port", "0"), 2, "it has no tokenizer, so it cannot be served")


def test_an_engine_without_a_chat_template(engine: Path, tmp_path: Path) -> None:
    """It continues texts. Its card tells of a validation."""
    copy = without(engine, tmp_path / "engine", "chat_template")
    (copy / CARD).write_text(measured(MEASURED), encoding="utf-8")
    server = Server(open_service(copy, "plain", ServingLimits(), fast=True))
    server.service.scheduler.start()

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://server") as client:
            turns = [{"role": "user", "content": "a"}]
            return [
                await client.post("/v1/chat/completions", json={"model": "plain", "messages": turns}),
                await client.post("/v1/completions", json={"model": "plain", "prompt": "a"}),
                await client.get("/v1/models"),
                await client.get("/health"),
                await client.get("/ping"),
            ]

    chat, text, models, health, ping = asyncio.run(ask())
    assert (health.status_code, ping.status_code) == (200, 200)
    server.service.scheduler.stop()
    assert [answer.status_code for answer in asyncio.run(ask())[-2:]] == [503, 503]  # nothing would answer any more
    assert chat.status_code == 400
    assert chat.json()["error"]["message"].startswith("plain has no chat template")
    assert text.status_code == 200
    assert models.json()["data"][0]["validation"] == {
        "perplexity": 25.062,
        "reference_perplexity": 24.938,
        "kl_mean": 0.00466,
        "kl_p99": 0.0341,
        "top1_percent": 96.08,
    }
