"""smoothquant serve-config: a Triton model repository for an engine, and the commands that serve it."""

from __future__ import annotations

import argparse

from recipes.cli import options
from recipes.cli.ui import Ui


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "serve-config",
        parents=[common],
        help="serve a TensorRT-LLM engine: a Triton model repository, and the commands",
        description="Write a model repository for Triton's tensorrtllm backend (tokenizer, in-flight batching, "
        "detokenizer, and an ensemble of them), and print the commands that start tritonserver and trtllm-serve. Paths "
        "in it are those of this machine; mount the folders there, or say where they will be.",
    )
    command.add_argument("engine", metavar="ENGINE", help="folder made by smoothquant build tensorrt-llm")
    command.add_argument("--out", required=True, metavar="REPOSITORY", help="folder to make")
    command.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: the engine's)")
    command.add_argument("--engine-at", metavar="PATH", help="where the server finds the engine (default: as here)")
    command.add_argument("--repository-at", metavar="PATH", help="where the server finds the repository")
    command.add_argument(
        "--memory", type=float, default=0.9, help="share of the free GPU memory for the KV cache (default 0.9)"
    )
    command.add_argument("--instances", type=int, default=1, help="of tokenizer and detokenizer (default 1)")
    options.add_overwrite(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders.serving.tensorrt_llm.repository import request_example, write_repository
    from builders.tensorrt_llm.format.releases import TRITON

    found = write_repository(
        arguments.engine,
        arguments.out,
        tokenizer=arguments.tokenizer,
        engine_at=arguments.engine_at,
        repository_at=arguments.repository_at,
        memory=arguments.memory,
        instances=arguments.instances,
        overwrite=arguments.overwrite,
    )
    ui.result({"out": arguments.out, "triton": found.triton, "trtllm_serve": found.trtllm_serve})
    ui.say(
        f"{arguments.out}: for Triton, an engine of TensorRT-LLM {found.engine.version} on {found.engine.ranks} GPUs"
    )
    if found.triton:
        ui.say(f"triton        {found.triton}")
        ui.say(f"try           {request_example()}")
    else:
        known = ", ".join(f"{version} ({tag})" for version, tag in TRITON.items())
        ui.say(f"triton        NVIDIA lists no container with TensorRT-LLM {found.engine.version}; it has {known}")
    ui.say(f"trtllm-serve  {found.trtllm_serve}")
