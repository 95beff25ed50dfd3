"""smoothquant check: will an engine take what was made, and run it in INT8? Found out before anybody needs a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from recipes.cli.check_onnx import check_onnx, show_rules
from recipes.cli.ui import Ui
from smoothquant.errors import UserError
from smoothquant.workspace import MANIFEST, load_manifest

COMPILERS = ("tensorrt-rtx",)
CHECKERS: Mapping[str, Callable[[argparse.Namespace, Ui], None]] = {  # step that made a folder -> what checks it
    "export onnx": check_onnx,
    "build onnxruntime": check_onnx,
}


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "check",
        parents=[common],
        help="will TensorRT take it, and run it in INT8",
        description="Look at an ONNX graph with TensorRT's eyes: every rule that its versions are known to have, each "
        "with its reason, and with --compiler a real compiler, which needs no GPU. Exit status 1 if it would be "
        "refused, or if a linear that should be INT8 is not.",
    )
    command.add_argument(
        "engine",
        metavar="ENGINE_OR_ONNX",
        nargs="?",
        help="folder made by smoothquant export or build, or any .onnx file",
    )
    command.add_argument("--rules", action="store_true", help="print the rules for ONNX graphs, with their reasons")
    command.add_argument(
        "--compiler",
        choices=COMPILERS,
        help="compile it too: tensorrt-rtx is TensorRT's parser and compiler for PCs, from PyPI, on any Linux x86-64",
    )
    command.add_argument(
        "--tensorrt", metavar="VERSION", help="the TensorRT that is to take it, such as 8.6 or 10.3 (default: newest)"
    )
    command.add_argument("--max-batch", type=int, default=4, help="compile for so many sequences (default 4)")
    command.add_argument("--chunk", type=int, default=256, help="tokens of a run (default 256)")
    command.add_argument("--max-length", type=int, default=2048, help="tokens of a sequence (default 2048)")
    command.add_argument("--layers", action="store_true", help="with a compiler: print every layer of the engine")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    if arguments.rules:
        return show_rules(ui)
    if not arguments.engine:
        raise UserError("nothing to check", expected="an ENGINE_OR_ONNX, or --rules")
    checker(Path(arguments.engine))(arguments, ui)


def checker(path: Path) -> Callable[[argparse.Namespace, Ui], None]:
    """What checks this file or folder. Raises UserError for what nothing checks."""
    if not (path / MANIFEST).exists():
        return check_onnx
    step = load_manifest(path)["step"]
    if step not in CHECKERS:
        raise UserError(
            f"{path}: made by {step!r}, which there is no check for",
            expected=f"an ONNX file, or a folder made by one of: {', '.join(CHECKERS)}",
        )
    return CHECKERS[step]
