"""smoothquant build {onnxruntime,tensorrt-llm}: an engine out of an export."""

from __future__ import annotations

import argparse

from recipes.cli import build_tensorrt_llm, options
from recipes.cli.ui import Ui


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    build = commands.add_parser("build", help="make an engine from an export", description="Make an engine folder.")
    targets = build.add_subparsers(dest="target", metavar="{onnxruntime,tensorrt-llm}", required=True)
    command = targets.add_parser(
        "onnxruntime",
        parents=[common],
        help="ONNX Runtime engine, also for onnxruntime-genai",
        description="Make a folder that ONNX Runtime and onnxruntime-genai run: graph, weights (linked, not copied, "
        "where the disk allows), tokenizer, session settings for this machine. The engine is loaded and run once, and "
        "every quantized linear must have become an integer kernel.",
    )
    command.add_argument("export", metavar="EXPORT", help="folder made by smoothquant export onnx")
    command.add_argument("--out", required=True, metavar="ENGINE", help="folder to make")
    options.add_overwrite(command)
    command.set_defaults(run=run)
    build_tensorrt_llm.add(targets, common)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders import onnxruntime

    with ui.progress("build onnxruntime") as progress:
        progress(0, 1)
        manifest = onnxruntime.build(arguments.export, arguments.out, overwrite=arguments.overwrite)
        progress(1, 1)
    ui.result({"out": arguments.out, "manifest": manifest})
    kernels = manifest["kernels"]
    ui.say(f"{arguments.out}: {kernels['integer']} of {kernels['quantized']} quantized products are integer kernels")
    ui.say(f'{arguments.out}: try  smoothquant generate {arguments.out} "Once upon a time"')
