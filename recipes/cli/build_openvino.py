"""smoothquant build openvino."""

from __future__ import annotations

import argparse

from recipes.cli import options
from recipes.cli.ui import Ui

NAME = "openvino"


def add(targets: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = targets.add_parser(
        NAME,
        parents=[common],
        help="OpenVINO engine, on a CPU",
        description="Make a folder that OpenVINO runs on this CPU: graph and weights as they were exported (a copy, "
        "which shares the export's room where the disk can do that), tokenizer. OpenVINO compiles the graph when the "
        "engine is opened. The engine is compiled and run once, and every quantized linear must have become an integer "
        "kernel.",
    )
    options.add_engine(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders import openvino
    from builders.openvino.record import OpenVinoResults

    with ui.progress("build openvino") as progress:
        progress(0, 1)
        manifest = openvino.build(
            arguments.export, arguments.out, activations=arguments.act, overwrite=arguments.overwrite
        )
        progress(1, 1)
    ui.result({"out": arguments.out, "manifest": manifest.as_dict()})
    kernels = manifest.results_as(OpenVinoResults).kernels
    told = f"{kernels.integer} of {kernels.quantized} quantized products are integer kernels"
    ui.done(arguments.out, f"{arguments.out}: {told}; {manifest.nbytes / 1e6:,.1f} MB on the disk")
    options.say_faster(ui)
    options.say_next(ui, arguments)
