"""The command line: `smoothquant COMMAND ...`. One file per command in this folder.

What ends a command, its exit status among it, is in `recipes.cli.process`.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from recipes.cli import (
    build,
    calibrate,
    check,
    compare,
    convert,
    demo,
    doctor,
    estimate,
    export,
    generate,
    options,
    places,
    recipes,
    reproduce,
    run,
    scales,
    search,
    serve,
    serve_config,
    validate,
)
from recipes.cli.forms import CommandParser
from recipes.cli.process import check_words, guarded
from recipes.cli.ui import Ui
from smoothquant import __version__

COMMANDS = (
    estimate,
    calibrate,
    search,
    export,
    convert,
    check,
    build,
    validate,
    compare,
    generate,
    serve,
    serve_config,
    run,
    recipes,
    reproduce,
    demo,
    scales,
    doctor,
)

EPILOG = """\
the way from a model to a validated INT8 engine:
  smoothquant search MODEL --text calibration.txt --out model-plan --report plan.html
  smoothquant export onnx MODEL --plan model-plan --out model-onnx
  smoothquant build onnxruntime model-onnx --out model-engine
  smoothquant validate model-engine --plan model-plan --reference MODEL --text heldout.txt --report report.html
  smoothquant generate model-engine "Once upon a time"

or all of it, resumable:   smoothquant run llama-2-7b --model MODEL --text calibration.txt --out DIR
or first, on a small bundled model:   smoothquant demo

MODEL is a Hugging Face model folder. Every command: smoothquant COMMAND --help
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = CommandParser(
        prog="smoothquant",
        description="W8A8 INT8 for large language models: calibrate or search, smooth, quantize, export, build, prove.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"smoothquant {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    common.add_argument("--quiet", action="store_true", help="no progress bars or notes on standard error")
    for command in COMMANDS:
        command.add(commands, common)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""

    def command() -> None:
        given = sys.argv[1:] if argv is None else argv
        check_words(given)
        arguments = parser().parse_args(given)
        set_up_libraries()
        with options.joined(arguments) as team:
            ui = Ui(json=arguments.json, quiet=arguments.quiet, mute=not team.leads)
            with ui.listening():
                places.check(arguments)
                arguments.run(arguments, ui)

    return guarded(command)


def set_up_libraries() -> None:
    """Settings that libraries read when they are imported: this tool's output is its own, its cores are shared."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: on shared cores, several times quicker
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors on large pages: about 8 % of calibrate + export
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime 1.29 and later tells Microsoft of every model
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
