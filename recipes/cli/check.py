"""smoothquant check: will an engine take what was made, and run it in INT8? Found out before anybody needs a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from recipes.cli.check_onnx import COMPILED_FOR, attribute, check_onnx, show_rules
from recipes.cli.check_readers import check_readers
from recipes.cli.check_tensorrt import check_tensorrt
from recipes.cli.check_trtllm import check_trtllm
from recipes.cli.ui import Ui
from smoothquant.errors import UserError

COMPILERS = ("tensorrt-rtx",)
Checker = Callable[[argparse.Namespace, Ui], None]
CHECKERS: Mapping[str, Checker] = {  # step that made a folder -> what checks it
    "export onnx": check_onnx,
    "build onnxruntime": check_onnx,
    "build openvino": check_onnx,
    "build tensorrt": check_tensorrt,
    "export trtllm": check_trtllm,
}


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "check",
        parents=[common],
        help="will an engine take it, and run it in INT8",
        description="Look at an ONNX graph with TensorRT's eyes: every rule that its versions are known to have, each "
        "with its reason, and with --compiler a real compiler, which needs no GPU. Look at a TensorRT-LLM checkpoint "
        "by the rules of its loader: tensors, shapes, keys, scales. Look at a TensorRT engine, which says what became "
        "of every product. With --for, say what a server makes of a folder. Exit status 1 if it would be refused, or "
        "if a linear that should be INT8 is not.",
    )
    command.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        help="folder made by smoothquant export or build, any .onnx file, or any TensorRT-LLM checkpoint",
    )
    command.add_argument(
        "--for",
        dest="reader",
        metavar="SERVER",
        help="whether this server loads the folder, with which kernel, as written or changed: vllm, sglang, "
        "tensorrt-llm, edge-llm, transformers, onnxruntime, genai or openvino",
    )
    command.add_argument(
        "--gpu",
        metavar="NAME",
        help="with --for: on this GPU (a100, h100, l4, b200, ...), a compute capability such as 8.6, cpu or cpu-amx",
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
    for option, (default, meaning) in COMPILED_FOR.items():
        command.add_argument(option, type=int, metavar="N", help=f"compile for {meaning} (default {default})")
    command.add_argument(
        "--layers", action="store_true", help="of a TensorRT engine, or with a compiler: print every layer"
    )
    command.add_argument(
        "--against",
        metavar="EXPORT",
        help="run a TensorRT engine, and ONNX Runtime on what it was built from; compare every output (polygraphy)",
    )
    command.add_argument(
        "--integrity",
        action="store_true",
        help="read every file of an export, engine or repository of this tool, and compare it with what was written",
    )
    command.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="NAME",
        help="with --integrity: note that this file was changed on purpose (a tokenizer, a chat template, settings)",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    if arguments.rules:
        return show_rules(ui)
    if not arguments.path:
        raise UserError("nothing to check", expected="a folder or an .onnx file, or --rules")
    if arguments.gpu and not arguments.reader:
        raise UserError("--gpu without --for", expected="--for vllm, or another server, with it")
    if arguments.reader:
        for option in ("--compiler", "--tensorrt", "--layers", "--against", "--integrity", "--accept", *COMPILED_FOR):
            if getattr(arguments, attribute(option)):
                raise UserError(f"--for with {option}", expected="one of them", do="run check twice")
        return check_readers(arguments, ui)
    if arguments.integrity or arguments.accept:
        return check_integrity(arguments, ui)
    chosen = checker(Path(arguments.path))
    for option in ("--compiler", "--tensorrt"):
        if chosen is not check_onnx and getattr(arguments, attribute(option)):
            raise UserError(f"{arguments.path} with {option}", expected="an ONNX graph", do="check the export")
    for option in COMPILED_FOR:
        if not arguments.compiler and getattr(arguments, attribute(option)) is not None:
            raise UserError(f"{option} without --compiler", expected="--compiler tensorrt-rtx with it")
    if arguments.layers and not arguments.compiler and chosen is not check_tensorrt:
        raise UserError("--layers without --compiler", expected="--compiler tensorrt-rtx with it, or a TensorRT engine")
    if arguments.against and chosen is not check_tensorrt:
        raise UserError(f"{arguments.path} with --against", expected="a folder made by smoothquant build tensorrt")
    chosen(arguments, ui)


def check_integrity(arguments: argparse.Namespace, ui: Ui) -> None:
    """Compare every file of an output with what was written. Raises UserError for the first that differs."""
    from smoothquant.outputs import MANIFEST, TOP_MANIFEST, accept, check_content, load_manifest

    folder = Path(arguments.path)
    place = MANIFEST if (folder / MANIFEST).exists() else TOP_MANIFEST
    manifest = accept(folder, arguments.accept, place) if arguments.accept else load_manifest(folder, place)
    check_content(folder, manifest)
    accepted = sorted(name for name, facts in manifest.files.items() if facts.accepted)
    ui.result({"path": arguments.path, "files": len(manifest.files), "bytes": manifest.nbytes, "accepted": accepted})
    changed = f"; changed on purpose: {', '.join(accepted)}" if accepted else ""
    ui.say(f"{folder}: {len(manifest.files)} files, {manifest.nbytes / 1e6:,.1f} MB, all as written{changed}")


def checker(path: Path) -> Checker:
    """What checks this file or folder. Raises UserError for what nothing checks."""
    from builders.tensorrt_llm import is_checkpoint
    from smoothquant.outputs import is_output, load_manifest

    if path.is_dir() and is_checkpoint(path):
        return check_trtllm
    if not is_output(path):
        return check_onnx
    step = load_manifest(path).step
    if step not in CHECKERS:
        raise UserError(
            f"{path}: made by {step!r}, which there is no check for",
            expected=f"an ONNX file, a TensorRT-LLM checkpoint, or a folder made by one of: {', '.join(CHECKERS)}",
        )
    return CHECKERS[step]
