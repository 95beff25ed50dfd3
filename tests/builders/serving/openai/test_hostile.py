"""A thousand malformed requests: each gets an error in OpenAI's form, and the server lives on."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from builders.serving.openai.app import LARGEST_BODY, Server
from builders.serving.openai.service import ServingLimits, open_service
from tests.builders.serving.openai.served import served

JSON = {"Content-Type": "application/json"}
COMPLETION: dict[str, Any] = {"model": "engine", "prompt": "ab", "max_tokens": 2, "temperature": 0}
CHAT: dict[str, Any] = {"model": "engine", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 2}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/invocations": COMPLETION}
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 0.5, 3, 10**9, -(10**30), 10**99, 1e308, "", "a", "\0", "\ufffd", [], {}, [[]], [None]),
    *([1.5], ["a", 1], [[1], "a"], {"a": {"b": []}}, [-1], [10**50], ["a"] * 300, {"role": "user"}, [{"role": 5}]),
)
FIELDS = (
    *(
        "model",
        "prompt",
        "messages",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
    ),
    *("stream", "stream_options", "echo", "logprobs", "top_logprobs", "best_of", "suffix", "tools", "tool_choice"),
    *("response_format", "logit_bias", "user", "functions", "x", "", "__class__", "é", "model_config"),
)
RAW = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"a"',
    b"\xff\xfe",
    b'{"model": "engine", "prompt": "\xff"}',
    b'{"model": "engine", "prompt": "\\ud800"}',
    b'{"model": "engine", "prompt": "a", "\\udfff": 1}',
    b'{"model": "engine", "prompt": "a", "temperature": NaN}',
    b'{"model": "engine", "prompt": "a", "temperature": -Infinity}',
    b'{"model": "engine", "prompt": "a", "temperature": 1e999}',
    b'{"model": "engine", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "engine", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"model": "engine", "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
)


def mutated(chance: random.Random) -> tuple[str, bytes]:
    """A path, and a body that was made wrong in one of many ways (or that by chance is right)."""
    path = chance.choice(list(PATHS))
    body = dict(PATHS[path])
    kind = chance.random()
    if kind < 0.05:
        return path, chance.choice(RAW)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if chance.random() < 0.15:
            body.pop(chance.choice(list(body)), None)
        else:
            body[chance.choice(FIELDS)] = chance.choice(VALUES)
    if "messages" in body and chance.random() < 0.3:
        body["messages"] = [{"role": chance.choice(VALUES), "content": chance.choice(VALUES)}, chance.choice(VALUES)]
    made = json.dumps(body).encode()
    if kind < 0.15:
        place = chance.randrange(len(made))
        return path, made[:place] + bytes([chance.randrange(256)]) + made[place + chance.randrange(2) :]
    return path, made if kind < 0.95 else made[: chance.randrange(len(made))]


def check(answer: httpx.Response) -> None:
    """An answer, or an error in OpenAI's form; in a stream, too."""
    if answer.status_code == 200:
        return
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]


def test_a_thousand_requests(engine: Path) -> None:
    server = Server(open_service(engine, None, ServingLimits(batch=4, queue=64), fast=True))
    server.service.scheduler.start()
    chance = random.Random(16)
    statuses: list[int] = []

    async def ask() -> None:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for _ in range(1000):
                path, body = mutated(chance)
                answer = await client.post(path, content=body, headers=JSON)
                check(answer)
                statuses.append(answer.status_code)
            for body in RAW:
                for path in ("/v1/completions", "/invocations"):
                    assert (await client.post(path, content=body, headers=JSON)).status_code == 400, body[:50]
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200

    try:
        asyncio.run(ask())
    finally:
        server.service.scheduler.stop()
    assert statuses.count(400) > 600
    assert statuses.count(200) > 20  # the control: some changes ask for something that there is


@pytest.fixture(scope="module")
def root(engine: Path) -> Iterator[str]:
    with served(engine, "--api-key-env", "KEYS", env={"KEYS": "first, second-é"}) as server:
        yield server.root


def sent(root: str, *parts: bytes) -> bytes:
    """What comes back over a socket, after which the client goes."""
    host, port = root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        return connection.recv(1 << 16)


def test_over_a_socket(root: str) -> None:
    authorized = {"Authorization": "Bearer first"}
    with httpx.Client(base_url=root, headers=authorized) as client:
        for number in range(40):
            path, body = mutated(random.Random(number))
            check(client.post(path, content=body, headers=JSON))
        for method, path, status in (
            ("GET", "/", 404),
            ("POST", "/v1/embeddings", 404),
            ("GET", "/v1/completions", 405),
            ("DELETE", "/v1/models", 405),
            ("GET", "/v1/models/..%2f..%2fetc", 404),
            ("GET", "/docs", 404),
        ):
            answer = client.request(method, path)
            assert answer.status_code == status
            assert ("allow" in answer.headers) == (status == 405)
            check(answer)
        assert client.post("/v1/completions", content=json.dumps(COMPLETION)).status_code == 415
        assert client.post("/v1/completions", content=b" " * (LARGEST_BODY + 1), headers=JSON).status_code == 413
        chunked = client.post("/v1/completions", content=(b" " * (1 << 20) for _ in range(9)), headers=JSON)
        assert chunked.status_code == 413
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\nContent-Type: application/json\r\n"
    )
    for request in (b"\x16\x03\x01\0", b"GET\r\n\r\n", head + b"Content-Length: x\r\n\r\n", head + b"\0: 1\r\n\r\n"):
        assert sent(root, request).startswith(b"HTTP/1.1 400")
    length = b"Content-Length: 99\r\n\r\n{"
    host, port = root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + length)  # the client goes before its body has ended
    assert httpx.post(f"{root}/v1/completions", json=COMPLETION, headers=authorized).status_code == 200


def test_keys(root: str) -> None:
    for given in ("", "Bearer", "Bearer firs", "Bearer first2", "Basic first", "first", "Bearer \xff"):
        headers = [(b"Authorization", given.encode("latin-1"))] if given else []
        for path in ("/v1/models", "/metrics", "/v1/completions", "/invocations", "/nothing"):
            answer = httpx.get(root + path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("first", "second-é"):
        headers = [(b"Authorization", f"Bearer {key}".encode())]
        assert httpx.get(f"{root}/v1/models", headers=headers).status_code == 200
    for path in ("/health", "/ready", "/ping"):
        assert httpx.get(root + path).status_code == 200
