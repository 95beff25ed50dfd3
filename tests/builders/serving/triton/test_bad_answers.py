"""`generate --triton`, and a server that answers nonsense, goes away, or is none: one line, and no traceback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")

import grpc
from tritonclient.grpc import service_pb2

from builders import onnxruntime
from builders.serving.triton import client
from recipes.cli import main
from tests.builders.serving.triton.bad_server import Answer, Script, content, logits, refusal, serving, tensor
from tests.forked import assert_one_line, in_a_new_process

NAN, LARGE = float("nan"), float("inf")
SHAPE = "expected float32 or float16 of shape [1, 3, 288]"
BAD: dict[str, tuple[Answer, str]] = {  # an answer, and what is said of it
    "0 bytes": (content(lambda raw: b""), "the server's answer holds no logits (cannot reshape array of size 0"),
    "too short": (content(lambda raw: raw[: len(raw) // 2]), "holds no logits (cannot reshape"),
    "too long": (content(lambda raw: raw * 2), "holds no logits (cannot reshape"),
    "half a number": (content(lambda raw: raw[:-1]), "holds no logits (buffer size must be a multiple"),
    "no output": (lambda *_: service_pb2.ModelInferResponse(), f"the server's answer holds no logits; {SHAPE}"),
    "no content": (
        lambda *_: service_pb2.ModelInferResponse(
            outputs=[{"name": "logits", "datatype": "FP32", "shape": [1, 3, 288]}]
        ),
        "holds no logits (cannot reshape",
    ),
    "another output": (logits(name="scores"), f"the server's answer holds no logits; {SHAPE}"),
    "whole numbers": (logits(datatype="INT64"), f"the server's logits are int64 of shape [1, 3, 288]; {SHAPE}"),
    "strings": (content(lambda raw: raw, "BYTES"), "logits are object of shape [1, 3, 288]"),
    "broken strings": (content(lambda raw: b"\xff" * 8, "BYTES"), "holds no logits ("),
    "an unknown type": (content(lambda raw: raw, "WORDS"), "holds no logits (cannot reshape"),
    "double precision": (content(lambda raw: raw * 2, "FP64"), "logits are float64 of shape [1, 3, 288]"),
    "another vocabulary": (logits(300), f"logits are float32 of shape [1, 3, 300]; {SHAPE}"),
    "another length": (logits(rows=1), "logits are float32 of shape [1, 4, 288]"),
    "no batch": (lambda *_: tensor("logits", "FP32", [288], b"\0" * 288 * 4), "logits are float32 of shape [288]"),
    "a negative shape": (
        lambda *_: tensor("logits", "FP32", [1, -1, 288], b""),
        "logits are float32 of shape [1, 0, 288]",
    ),
    "NaN": (logits(fill=NAN), "the engine's logits are NaN or infinite"),
    "infinity": (logits(fill=LARGE), "the engine's logits are NaN or infinite"),
    "no protobuf": (lambda *_: b"\xff" * 20, "the server failed ([StatusCode.INTERNAL]"),
    "its own error": (
        refusal(grpc.StatusCode.INTERNAL, "Failed to process\n\nAt:\n  model.py(7): execute"),
        "the server failed ([StatusCode.INTERNAL] Failed to process); see its log",
    ),
    "an error without words": (refusal(grpc.StatusCode.INTERNAL, ""), "the server failed ([StatusCode.INTERNAL])"),
    "a long error": (refusal(grpc.StatusCode.INTERNAL, "x" * 5000), "x" * 200),
}


@pytest.fixture(scope="module")
def engine(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "int8-engine"
    onnxruntime.build(exports["per-token"], folder)
    return folder


@pytest.fixture
def generate(engine: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Continue "abc" on a server: generate("localhost:8001") -> the line on stderr, and standard output."""

    def run(server: str, *more: str) -> tuple[str, str]:
        begin = time.monotonic()
        assert main(["generate", str(engine), "abc", "--triton", server, "--quiet", *more]) == 2
        assert time.monotonic() - begin < 20
        found = capsys.readouterr()
        [line] = found.err.splitlines()
        assert line.startswith("smoothquant: ")
        assert len(line) < 1000
        return line, found.out

    return run


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer(name: str, generate: Any) -> None:
    answer, said = BAD[name]
    with serving(Script(answer)) as server:
        line, out = generate(server)
    assert said in line
    assert out == "[3 tokens] abc\n\n"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_in_mid_sequence(name: str, generate: Any) -> None:
    """After a first token. The sequence is ended."""
    answer, said = BAD[name]
    script = Script(logits(), logits(), answer)
    with serving(script) as server:
        line, out = generate(server)
    assert said.replace("[1, 3, ", "[1, 1, ").replace("[1, 4, ", "[1, 2, ") in line
    assert script.ends == [False, False, False, True]
    assert out == "[3 tokens] abc\n!!\n"  # the error does not stand behind the text


def test_a_bad_answer_in_a_prompt(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the second of its requests: the sequence is ended all the same."""
    monkeypatch.setattr(client, "CHUNK", 2)
    script = Script(logits(), content(lambda raw: b""))
    with serving(script) as server:
        line, _ = generate(server)
    assert "expected float32 or float16 of shape [1, 2, 288]" in line
    assert script.ends == [False, False, True]


def test_good_answers_are_taken(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control."""
    with serving(Script(logits())) as server:
        assert main(["generate", str(engine), "abc", "--triton", server, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out == "[3 tokens] abc\n!!!\n"


def test_a_server_that_goes_away_in_mid_sequence(generate: Any) -> None:
    def gone(request: Any, context: grpc.ServicerContext) -> Any:
        script.stop()
        return logits()(request, context)

    script = Script(logits(), gone)
    with serving(script) as server:
        line, _ = generate(server)
    assert f"{server}: the server failed ([StatusCode." in line


def test_a_server_that_hangs(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(request: Any, context: grpc.ServicerContext) -> Any:
        script.ended.wait(60)
        return logits()(request, context)

    monkeypatch.setattr(client, "BRIEFLY", 0.5)
    script = Script(logits(), hang)
    with serving(script) as server:
        line, _ = generate(server, "--timeout", "1")
        assert f"{server}: the server has not answered for 1 seconds; see its log" in line
        assert "give a larger --timeout" in line
        script.ended.set()


def test_a_server_without_this_model(generate: Any) -> None:
    with serving(Script(logits(), ready=False)) as server:
        line, _ = generate(server)
    assert f"{server}: this server has no model 'int8-engine'; expected a repository that this engine" in line


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9"])
def test_a_timeout_that_is_none(seconds: str, generate: Any) -> None:
    line, _ = generate("localhost:1", f"--timeout={seconds}")
    assert "expected a number of seconds above 0, at most 86400" in line


# -- what is no Triton -------------------------------------------------------------------------------------------------


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def http() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def another_service() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def nobody() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    yield f"127.0.0.1:{port}"


def talker(greeting: bytes, end: bool) -> Iterator[str]:
    """Says something to everybody who connects, and ends the connection or listens on."""
    held = []

    def talk() -> None:
        with suppress(OSError):
            while True:
                held.append(listening.accept()[0])
                held[-1].sendall(greeting)
                if end:
                    held[-1].close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=talk, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


LISTENERS: dict[str, Callable[[], Iterator[str]]] = {
    "HTTP": http,
    "another service": another_service,
    "nobody": nobody,
    "silence": lambda: talker(b"", end=False),
    "a greeting": lambda: talker(b"SSH-2.0-OpenSSH_9.6\r\n", end=False),
    "the end": lambda: talker(b"", end=True),
}


@pytest.fixture(params=LISTENERS)
def listener(request: pytest.FixtureRequest) -> Iterator[str]:
    """HOST:PORT where something else listens, or nothing."""
    yield from LISTENERS[request.param]()


def test_something_else_listens(listener: str, generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BRIEFLY", 2.0)
    line, out = generate(listener)
    assert f"{listener}: no Triton server answers (" in line
    assert "expected HOST:PORT of its gRPC service" in line
    assert out == ""


@pytest.mark.parametrize("address", ["", "localhost", "http://127.0.0.1:1", "127.0.0.1:99999", "a b:1", "x.invalid:1"])
def test_what_is_no_address(address: str, generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BRIEFLY", 2.0)
    line, _ = generate(address)
    assert f"smoothquant: {address}: no Triton server answers (" in line


# -- in a process of its own, whose stderr is also that of gRPC's C library --------------------------------------------


def test_nothing_else_is_said(engine: Path) -> None:
    for name in ("0 bytes", "no protobuf"):
        answer, said = BAD[name]
        with serving(Script(logits(), answer)) as server:
            assert_one_line(in_a_new_process("generate", engine, "abc", "--triton", server), 2, server, said)
    assert_one_line(in_a_new_process("generate", engine, "abc", "--triton", server), 2, "no Triton server answers")
