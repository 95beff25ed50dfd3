"""smoothquant serve-config: a folder that somebody's server takes, and the commands that start it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from recipes.cli import options
from recipes.cli.ui import Ui
from smoothquant.errors import UserError

OPTIONS: Mapping[str, tuple[str, ...]] = {  # server -> the options that are its own
    "triton": ("tokenizer", "engine_at", "repository_at", "memory", "instances", "window"),
    "sagemaker": ("name", "s3", "image", "role", "max_length"),
}


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "serve-config",
        parents=[common],
        help="hand an engine or a W8A8 folder to Triton, trtllm-serve or SageMaker: a folder, and the commands",
        description="For a TensorRT-LLM engine, write a model repository for Triton's tensorrtllm backend (tokenizer, "
        "in-flight batching, detokenizer, and an ensemble of them), and print the commands that start tritonserver and "
        "trtllm-serve. Paths in it are those of this machine; mount the folders there, or say where they will be. With "
        "--for sagemaker, write what SageMaker takes: an ONNX Runtime engine for our image, or a W8A8 folder with "
        "serving.properties for AWS's LMI container (vLLM), and the request that creates the model.",
    )
    command.add_argument("engine", metavar="FOLDER", help="an engine, or with --for sagemaker a W8A8 folder too")
    command.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    command.add_argument("--for", dest="server", choices=tuple(OPTIONS), default="triton", help="default: triton")
    options.add_overwrite(command)
    triton = command.add_argument_group("triton")
    triton.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: the engine's)")
    triton.add_argument("--engine-at", metavar="PATH", help="where the server finds the engine (default: as here)")
    triton.add_argument("--repository-at", metavar="PATH", help="where the server finds the repository")
    triton.add_argument("--memory", type=float, help="share of the free GPU memory for the KV cache (default 0.9)")
    triton.add_argument("--instances", type=int, help="of tokenizer and detokenizer (default 1)")
    triton.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="sliding window of the model, if the engine's manifest does not say (Mistral 7B v0.1: 4096)",
    )
    sagemaker = command.add_argument_group("sagemaker")
    sagemaker.add_argument("--name", help="of the model, in SageMaker and in requests (default: the folder's)")
    sagemaker.add_argument("--s3", metavar="PREFIX", help="where its files will be: s3://BUCKET/MODEL/")
    sagemaker.add_argument("--image", metavar="ADDRESS", help="of the container in a registry")
    sagemaker.add_argument("--role", metavar="ARN", help="role by which SageMaker reads both")
    sagemaker.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a prompt and its answer together (default: the model's)"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    for server, names in OPTIONS.items():
        for name in names if server != arguments.server else ():
            if getattr(arguments, name) is not None:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option}: an option of --for {server}", do=f"leave it out, or give --for {server}")
    WRITERS[arguments.server](arguments, ui)


def _triton(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders.serving.tensorrt_llm.repository import request_example, write_repository
    from builders.tensorrt_llm.format.releases import TRITON

    found = write_repository(
        arguments.engine,
        arguments.out,
        tokenizer=arguments.tokenizer,
        engine_at=arguments.engine_at,
        repository_at=arguments.repository_at,
        memory=0.9 if arguments.memory is None else arguments.memory,
        instances=1 if arguments.instances is None else arguments.instances,
        window=arguments.window,
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


def _sagemaker(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders.serving.sagemaker import REQUEST, deployment, write_sagemaker

    where = deployment(arguments.engine, arguments.name, arguments.s3, arguments.image, arguments.role)
    found = write_sagemaker(
        arguments.engine, arguments.out, where, max_length=arguments.max_length, overwrite=arguments.overwrite
    )
    ui.result(
        {
            "out": arguments.out,
            "name": where.name,
            "instances": list(found.instances),
            "to_fill": list(found.to_fill),
            **found.commands,
        }
    )
    on = f"on instances of {', '.join(found.instances)}" if found.instances else "on a processor"
    ui.say(f"{arguments.out}: for SageMaker, the model {where.name}, {on}")
    for what, command in found.commands.items():
        ui.say(f"{what:8}{command}")
    if found.to_fill:
        ui.note(f"fill in {', '.join(found.to_fill)}, here and in {arguments.out}/{REQUEST}, or give the options")


WRITERS: Mapping[str, Callable[[argparse.Namespace, Ui], None]] = {"triton": _triton, "sagemaker": _sagemaker}
