"""What SageMaker asks of a container: `GET /ping` and `POST /invocations`, of the real command."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.builders.serving.openai.served import Process, served

TURNS = [{"role": "user", "content": "Say it."}]
CHAT: dict[str, Any] = {"messages": TURNS, "max_tokens": 24, "temperature": 0}
COMPLETION: dict[str, Any] = {"prompt": "def main(", "max_tokens": 24, "temperature": 0}
PING = 2.0  # seconds that SageMaker waits for an answer


@pytest.fixture(scope="module")
def server(engine: Path) -> Iterator[Process]:
    with served(engine) as found:
        yield found


def invoke(server: Process, body: object) -> httpx.Response:
    return httpx.post(f"{server.root}/invocations", json=body, timeout=60)


def test_a_ping(server: Process) -> None:
    begin = time.monotonic()
    assert httpx.get(f"{server.root}/ping").status_code == 200
    assert time.monotonic() - begin < PING


def test_an_invocation_is_the_request_that_its_field_says(server: Process) -> None:
    """With the name of the model, and without."""
    client = server.client()
    chat = client.chat.completions.create(model="engine", **CHAT).choices
    text = client.completions.create(model="engine", **COMPLETION).choices
    for name in ({}, {"model": "engine"}, {"model": None}):
        assert ChatCompletion.model_validate(invoke(server, CHAT | name).json()).choices == chat
        assert Completion.model_validate(invoke(server, COMPLETION | name).json()).choices == text


def test_an_invocation_in_pieces(server: Process) -> None:
    """In HTTP's chunks, which SageMaker hands on as they come."""
    whole = ChatCompletion.model_validate(invoke(server, CHAT).json()).choices[0].message.content
    with httpx.stream("POST", f"{server.root}/invocations", json=CHAT | {"stream": True}, timeout=60) as answer:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["content-type"].startswith("text/event-stream")
        *lines, last = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert last == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(line) for line in lines]
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_invocations_that_are_refused(server: Process) -> None:
    either = "expected one of the fields messages, for a chat, and prompt, for a completion"
    for body, status, said in (
        ({}, 400, either),
        ({"inputs": "a"}, 400, either),
        (CHAT | COMPLETION, 400, either),
        ([], 400, "the body is no JSON object"),
        ({"prompt": 5}, 400, "prompt: expected a text"),
        ({"messages": []}, 400, "messages: "),
        (COMPLETION | {"messages": None}, 400, either),
        (COMPLETION | {"tools": [{}]}, 400, "tools: this server does not support it"),
        (COMPLETION | {"model": "other"}, 404, "there is no model 'other' here"),
    ):
        answer = invoke(server, body)
        assert (answer.status_code, answer.json()["error"]["message"][: len(said)]) == (status, said), body
    raw = httpx.post(f"{server.root}/invocations", content=b"{", headers={"Content-Type": "application/json"})
    assert (raw.status_code, json.loads(raw.content)["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.get(f"{server.root}/invocations").status_code == 405
