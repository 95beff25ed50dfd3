"""smoothquant build tensorrt-llm: an engine out of a checkpoint, where TensorRT-LLM is installed."""

from __future__ import annotations

import argparse
import shlex

from recipes.cli import options
from recipes.cli.ui import Ui

NAME = "tensorrt-llm"
LIMITS = {  # field of Limits -> what its option's help says
    "max_batch_size": "sequences at once (default 32)",
    "max_input_len": "tokens of a prompt (default: as many as --max-seq-len)",
    "max_seq_len": "tokens of prompt and answer together (default: the model's context)",
    "max_num_tokens": "tokens of all sequences in one step; longer prompts take several (default 8192; with an INT8 KV "
    "cache, which takes no prompts in pieces, at least --max-input-len)",
    "workers": "ranks to build at once, each on a GPU of its own (default 1)",
}


def add(targets: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = targets.add_parser(
        NAME,
        parents=[common],
        help="TensorRT-LLM engine, by NVIDIA's trtllm-build",
        description="Check a TensorRT-LLM checkpoint, then build an engine from it with trtllm-build and the options "
        "that SmoothQuant needs. Runs where TensorRT-LLM 0.20.0 to 1.2.1 and a GPU are: in the container of "
        "docker/tensorrt-llm. The engine runs on the kind of GPU that it was built on.",
    )
    command.add_argument(
        "export", metavar="CHECKPOINT", help="folder made by smoothquant export trtllm, or by NVIDIA's"
    )
    command.add_argument("--out", required=True, metavar="ENGINE", help="folder to make")
    for name, meaning in LIMITS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=meaning)
    command.add_argument("--dry-run", action="store_true", help="print the command, and run nothing")
    options.add_overwrite(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders.tensorrt_llm.build.build import build, plan
    from builders.tensorrt_llm.build.command import BuildLimits

    given = {name: getattr(arguments, name) for name in LIMITS if getattr(arguments, name) is not None}
    what = plan(arguments.export, arguments.out, BuildLimits(**given))
    for warning in what.warnings:
        ui.warn(str(warning))
    warnings = list(map(str, what.warnings))
    if arguments.dry_run:
        ui.result({"command": what.command, "warnings": warnings})
        ui.say(shlex.join(what.command))
        return

    def warn(text: str) -> None:
        ui.warn(text)
        warnings.append(text)

    with ui.progress("build tensorrt-llm") as progress:
        manifest = build(what, overwrite=arguments.overwrite, progress=progress, line=ui.note, note=warn)
    ui.result({"out": arguments.out, "manifest": manifest.as_dict(), "warnings": warnings})
    size = manifest.nbytes
    ui.say(f"{arguments.out}: {what.config.ranks} ranks, {size / 1e6:,.1f} MB")
    ui.say(f"{arguments.out}: serve it; see  smoothquant serve-config {arguments.out} --out REPOSITORY")
