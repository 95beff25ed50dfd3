"""smoothquant build onnxruntime."""

from __future__ import annotations

import argparse

from builders.onnxruntime.record import ATTENTION, STANDARD
from recipes.cli import options
from recipes.cli.ui import Ui

NAME = "onnxruntime"


def add(targets: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = targets.add_parser(
        NAME,
        parents=[common],
        help="ONNX Runtime engine, also for onnxruntime-genai",
        description="Make a folder that ONNX Runtime and onnxruntime-genai run: graph, weights (a copy, which shares "
        "the export's room where the disk can do that), tokenizer, session settings for this machine. The engine is "
        "loaded and run once, and on a CPU every quantized linear must have become an integer kernel.",
    )
    options.add_engine(command)
    options.add_triton(command)
    command.add_argument(
        "--provider",
        default="cpu",
        metavar="{cpu,cuda,tensorrt,nv-tensorrt-rtx}",
        help="where it runs (default cpu). cuda: an NVIDIA GPU, Q/DQ as float, without INT8 speed; tensorrt: INT8 by "
        "TensorRT 10; nv-tensorrt-rtx: INT8 by TensorRT for RTX, on RTX GPUs only",
    )
    command.add_argument(
        "--attention",
        choices=ATTENTION,
        default=STANDARD,
        help="standard: operators of ONNX, which every server and batches with padding on the left can take (default); "
        "grouped: ONNX Runtime's own operator, on a CPU, with which smoothquant serve computes many sequences at once",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders import onnxruntime
    from builders.onnxruntime.providers import find_provider
    from builders.onnxruntime.record import OnnxRuntimeResults

    provider = find_provider(arguments.provider)
    options.check_triton(arguments)
    if arguments.triton is not None:
        from builders.serving.triton import check_provider

        check_provider(arguments.export, arguments.act, provider.name)
    with ui.progress("build onnxruntime") as progress:
        progress(0, 1)
        manifest = onnxruntime.build(
            arguments.export,
            arguments.out,
            activations=arguments.act,
            provider=provider.name,
            attention=arguments.attention,
            overwrite=arguments.overwrite,
        )
        progress(1, 1)
    triton = options.write_triton(arguments)
    ui.result({"out": arguments.out, "manifest": manifest.as_dict(), **triton})
    kernels = manifest.results_as(OnnxRuntimeResults).kernels
    if provider.name == "cpu":
        told = f"{kernels.integer} of {kernels.quantized} quantized products are integer kernels"
    else:
        told = f"{kernels.quantized} quantized products; on {provider.name}, {provider.effect}"
    ui.done(arguments.out, f"{arguments.out}: {told}; {manifest.nbytes / 1e6:,.1f} MB on the disk")
    if provider.name == "cpu":
        options.say_faster(ui)
    options.say_next(ui, arguments, triton)
