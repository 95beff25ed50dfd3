"""100 clients at `smoothquant serve` for ten minutes: every answer is the one that the engine gives alone.

    python -m tests.benchmarks.serve_load ENGINE TEXT [--clients 100 --minutes 10 --prompts 64]

ENGINE: made by `build onnxruntime --attention grouped`. TEXT: a file; prompts are pieces of it, of which every second
one begins as others do. Clients are OpenAI's own. They ask without a pause: most wait for the whole answer or read it
as it comes, some leave in the middle of one, and some send what is no request. What the answers have to be comes from
`GeneratingEngine.generate`, one after another, before the server runs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil
from openai import AsyncOpenAI

from act_scales.kept_tokenizer import engine_encoder
from builders.engine.generation import GeneratingEngine
from builders.engine.table import open_engine
from smoothquant.files import scratch
from tests.benchmarks.load import server
from tests.benchmarks.results import Row, publish

PORT, BATCH, CONTEXT = 18613, 16, 2048
LENGTHS, NEW = (40, 3000), (1, 64)  # characters of a prompt, new tokens
BEGINNING = 800  # characters that prompts share
LEAVING, WRONG = 0.05, 0.05  # shares of clients' turns
MALFORMED: Sequence[tuple[bytes, str]] = [
    (b"{", "/v1/completions"),
    (b'{"model": "m", "prompt": 3}', "/v1/completions"),
    (b'{"model": "m", "prompt": "x", "n": -1}', "/v1/completions"),
    (b'{"model": "other", "prompt": "x"}', "/v1/completions"),
    (b'{"model": "m", "messages": []}', "/v1/chat/completions"),
    (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "/v1/chat/completions"),
    (b"\xff" * 100, "/v1/completions"),
]


@dataclass(frozen=True)
class Question:
    """A prompt, the number of new tokens, and what the engine answers alone."""

    prompt: str
    tokens: int
    answer: str


@dataclass
class Seen:
    """What clients have seen. ends: how turns ended. first: seconds to first tokens. memory: of the server, in bytes,
    once a second."""

    ends: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    questions = asked(arguments.engine, arguments.text.read_text(encoding="utf-8"), arguments.prompts)
    command = [sys.executable, "-m", "recipes.cli", "serve", arguments.engine, "--name", "m"]
    command += ["--max-batch", BATCH, "--max-context", CONTEXT]
    with scratch() as place, server(command, PORT, place / "log") as process:
        seen = asyncio.run(load(questions, arguments.clients, 60 * arguments.minutes, psutil.Process(process.pid)))
        counted = httpx.get(f"http://127.0.0.1:{PORT}/metrics").text
    running = next(line for line in counted.splitlines() if line.startswith("smoothquant_jobs_running "))
    publish("serve_load", rows(arguments, seen, running), {"ends": dict(seen.ends)})
    sys.exit(
        f"{seen.ends}, {running}" if seen.ends["wrong"] or seen.ends["failed"] or not running.endswith(" 0.0") else 0
    )


def asked(folder: Path, text: str, count: int) -> list[Question]:
    """The questions, with what the engine answers alone."""
    engine, draw = open_engine(folder), random.Random(0)
    assert isinstance(engine, GeneratingEngine)
    encoder = engine_encoder(engine.folder, engine.manifest)
    questions = []
    for number in range(count):
        begin, size = draw.randrange(len(text) - LENGTHS[1]), draw.randint(*LENGTHS)
        prompt = (text[:BEGINNING] if number % 2 else "") + text[begin : begin + size]
        tokens, ids = draw.randint(*NEW), [token for piece in encoder.whole([prompt]) for token in piece]
        answer = "".join(encoder.streamed(engine.generate(ids, tokens), ids))
        questions.append(Question(prompt, tokens, answer))
        print(f"\r{number + 1} of {count} answers", end="", file=sys.stderr)
    print(file=sys.stderr)
    return questions


async def load(questions: Sequence[Question], clients: int, seconds: float, process: psutil.Process) -> Seen:
    """What all clients see."""
    seen, end = Seen(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(limits=limits, timeout=600) as plain:
        url = f"http://127.0.0.1:{PORT}"
        openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=plain)
        tasks = [client(openai, plain, url, questions, random.Random(n), end, seen) for n in range(clients)]
        watch = asyncio.ensure_future(watched(process, end, seen))
        await asyncio.gather(*tasks)
        await watch
        await asyncio.sleep(2)
    return seen


async def client(
    openai: AsyncOpenAI,
    plain: httpx.AsyncClient,
    url: str,
    questions: Sequence[Question],
    draw: random.Random,
    end: float,
    seen: Seen,
) -> None:
    """One client, until the end."""
    while time.monotonic() < end:
        question, turn = draw.choice(questions), draw.random()
        try:
            if turn < WRONG:
                body, path = draw.choice(MALFORMED)
                found = await plain.post(url + path, content=body, headers={"content-type": "application/json"})
                refused = found.status_code in (400, 404) and "error" in found.json()
                seen.ends["refused" if refused else "failed"] += 1
            else:
                seen.ends[await answered(openai, question, turn < WRONG + LEAVING, turn < 0.5, seen)] += 1
        except Exception as error:  # whatever a client raises is a lost answer
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            seen.ends["failed"] += 1


async def answered(openai: AsyncOpenAI, question: Question, leaving: bool, stream: bool, seen: Seen) -> str:
    """How a turn ends."""
    options: dict[str, Any] = {"model": "m", "prompt": question.prompt, "max_tokens": question.tokens, "temperature": 0}
    begin = time.monotonic()
    if not stream:
        found = await openai.completions.create(**options)
        return "right" if found.choices[0].text == question.answer else "wrong"
    text, first = "", True
    async with await openai.completions.create(**options, stream=True) as chunks:
        async for chunk in chunks:
            if first:
                seen.first.append(time.monotonic() - begin)
                first = False
            text += chunk.choices[0].text
            if leaving:
                return "left"
    return "right" if text == question.answer else "wrong"


async def watched(process: psutil.Process, end: float, seen: Seen) -> None:
    """Note the server's memory once a second."""
    while time.monotonic() < end:
        seen.memory.append(process.memory_info().rss)
        print(
            f"\r{end - time.monotonic():.0f} s left, {dict(seen.ends)}, {seen.memory[-1] >> 20} MB  ",
            end="",
            file=sys.stderr,
        )
        await asyncio.sleep(1)
    print(file=sys.stderr)


def rows(arguments: argparse.Namespace, seen: Seen, running: str) -> list[Row]:
    third = len(seen.memory) // 3
    early, late = median(seen.memory[third : 2 * third]), median(seen.memory[2 * third :])
    hundredths = quantiles(seen.first, n=100)
    who = f"{arguments.clients} clients for {arguments.minutes:g} minutes"
    return [
        Row(
            f"{who}: answers",
            f"{seen.ends['right']} right, {seen.ends['wrong']} wrong, {seen.ends['failed']} lost",
            "0 wrong, 0 lost",
        ),
        Row(
            f"{who}: besides",
            f"{seen.ends['left']} clients left in the middle, {seen.ends['refused']} malformed requests were refused; "
            f"{running.split()[-1].removesuffix('.0')} jobs under way at the end",
            "0 jobs",
        ),
        Row(f"{who}: time to the first token", f"median {median(seen.first):.2f} s, 99 % {hundredths[98]:.2f} s"),
        Row(
            f"{who}: memory of the server",
            f"{late / early:.3f} x in the last third what it was in the second: {late / 2**20:.0f} MiB; "
            f"at most {max(seen.memory) / 2**20:.0f}",
            "level",
        ),
    ]


if __name__ == "__main__":
    main()
