"""smoothquant generate: continue a prompt with an engine."""

from __future__ import annotations

import argparse
import sys
import time
from itertools import chain

from recipes.cli.ui import Ui
from smoothquant.errors import UserError


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
    from act_scales.tokenizer import Encoder
    from builders.engine.generation import GeneratingEngine
    from builders.engine.table import open_engine
    from builders.serving.triton import TritonEngine

    engine = (
        TritonEngine(arguments.engine, arguments.triton, arguments.timeout)
        if arguments.triton is not None
        else open_engine(arguments.engine)
    )
    if not isinstance(engine, GeneratingEngine):
        raise UserError(
            f"{arguments.engine}: {engine.manifest.step!r} made it without a KV cache, so it cannot generate",
            expected="an engine with a KV cache",
            do="smoothquant export onnx MODEL ..., then smoothquant build --help",
        )
    encoder = Encoder(arguments.engine)
    tokenizer, prompt_ids = encoder.tokenizer, list(chain.from_iterable(encoder.whole([prompt])))
    tokens: list[int] = []
    shown = ""
    ui.write(f"[{len(prompt_ids)} tokens] {prompt}\n")
    begin = time.perf_counter()
    try:
        for token in engine.generate(
            prompt_ids,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        ):
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                ui.write(text[len(shown) :])
                shown = text
    finally:  # an error gets a line of its own
        ui.say("")
    seconds = time.perf_counter() - begin
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    ui.note(f"{len(tokens)} tokens, {len(tokens) / max(seconds, 1e-9):.1f} per second")
    ui.result({"prompt": prompt, "text": text, "tokens": tokens, "seconds": seconds})


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
