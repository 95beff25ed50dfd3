"""smoothquant generate: continue a prompt with an engine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from recipes.cli.ui import Ui
from smoothquant.errors import UserError

if TYPE_CHECKING:
    from builders.engine.protocol import Engine


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "generate",
        parents=[common],
        help="continue a prompt with an engine",
        description="Continue a prompt with an engine, token by token. Every token is the likeliest one, unless "
        "--temperature is given.",
    )
    command.add_argument("engine", metavar="ENGINE", help="folder made by smoothquant build")
    command.add_argument("prompt", help="text to continue; - reads it from standard input")
    command.add_argument("--max-new-tokens", type=int, default=64, help="stop after this many tokens (default 64)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    command.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens of this total probability; needs --temperature (default 1)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    command.add_argument(
        "--triton",
        metavar="HOST:PORT",
        help="generate on a Triton server that serves this engine; PORT is its gRPC port",
    )
    command.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="give up on a Triton server that takes longer for a request (default 300)",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    prompt = _prompt(arguments.prompt)
    from act_scales.kept_tokenizer import engine_encoder
    from builders.engine.generation import GeneratingEngine

    engine = _open(arguments)
    if not isinstance(engine, GeneratingEngine):
        raise UserError(
            f"{arguments.engine}: {engine.manifest.step!r} made it without a KV cache, so it cannot generate",
            expected="an engine with a KV cache",
            do="smoothquant export onnx MODEL ..., then smoothquant build --help",
        )
    encoder = engine_encoder(engine.folder, engine.manifest)
    prompt_ids = list(chain.from_iterable(encoder.whole([prompt])))
    tokens: list[int] = []
    ui.write(f"[{len(prompt_ids)} tokens] {prompt}\n")
    begin = time.perf_counter()
    generated = engine.generate(
        prompt_ids,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    pieces: list[str] = []
    try:
        for piece in encoder.streamed(_noted(generated, tokens), prompt_ids):
            pieces.append(piece)
            ui.write(piece)
    finally:  # an error gets a line of its own
        ui.say("")
    seconds = time.perf_counter() - begin
    ui.note(f"{len(tokens)} tokens, {len(tokens) / max(seconds, 1e-9):.1f} per second")
    ui.result({"prompt": prompt, "text": "".join(pieces), "tokens": tokens, "seconds": seconds})


def _open(arguments: argparse.Namespace) -> Engine:
    """The engine, here or on a server."""
    if arguments.triton is not None:
        from builders.serving.triton import TritonEngine

        return TritonEngine(arguments.engine, arguments.triton, arguments.timeout)
    from builders.engine.table import open_engine

    return open_engine(arguments.engine)


def _noted(generated: Iterator[int], tokens: list[int]) -> Iterator[int]:
    """Yield tokens, and add them to a list."""
    for token in generated:
        tokens.append(token)
        yield token


def _prompt(given: str) -> str:
    """The text to continue. Raises UserError if there is none, or if it is not in UTF-8."""
    if given == "-":
        try:
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
            given = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt: not UTF-8 text ({error.reason})", expected="text in UTF-8") from error
    if not given:
        raise UserError("the prompt is empty", expected="some text to continue")
    return given
