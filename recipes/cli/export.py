"""smoothquant export {hf,w8a8,onnx,trtllm}: smooth and quantize into others' formats."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli import export_onnx, export_trtllm, options
from recipes.cli.ui import Ui, listed
from smoothquant.errors import UserError
from smoothquant.settings import SmoothingSettings

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from exporters.export import Source, Writer
    from smoothquant.model import Model

TARGETS = {
    "hf": (
        "the smoothed float checkpoint",
        "The same function as MODEL, with weights and activations that 8 bits can hold; loads with "
        "AutoModelForCausalLM as is. Input to any other W8A8 quantizer.",
    ),
    "w8a8": (
        "the W8A8 checkpoint (compressed-tensors)",
        "INT8 weights per output channel, INT8 activations; loads with transformers + compressed-tensors, "
        "and is the form that vLLM serves.",
    ),
    "onnx": (export_onnx.SUMMARY, export_onnx.DESCRIPTION),
    "trtllm": (export_trtllm.SUMMARY, export_trtllm.DESCRIPTION),
}


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    export = commands.add_parser(
        "export",
        help="smooth and quantize a model into a format",
        description="Smooth and quantize a model, layer by layer, into a format. Memory is a layer, not a model; an "
        "interrupted export goes on at the layer where it stopped.",
    )
    targets = export.add_subparsers(dest="target", metavar=f"{{{','.join(TARGETS)}}}", required=True)
    for target, (summary, description) in TARGETS.items():
        command = targets.add_parser(target, parents=[common], help=summary, description=description)
        command.add_argument("model", metavar="MODEL", help="Hugging Face model folder")
        command.add_argument(
            "act_scales",
            metavar="ACT_SCALES",
            nargs="?",
            help="from smoothquant calibrate, or the published .pt form; not needed for --groups none with per-token "
            "activations, nor for a float graph",
        )
        command.add_argument("--out", required=True, metavar="DIR", help="folder to make")
        options.add_smoothing(command, alpha_default=0.5)
        _add_own(target, command)
        options.add_family(command)
        options.add_overwrite(command)
        command.set_defaults(run=run)


def _add_own(target: str, command: argparse.ArgumentParser) -> None:
    if target == "hf":
        command.add_argument(
            "--dtype", choices=("float16", "bfloat16", "float32"), help="of the weights (default: as in MODEL)"
        )
        return
    if target == "trtllm":
        export_trtllm.add_options(command)
        return
    if target == "onnx":
        export_onnx.add_options(command)
    else:
        command.add_argument(
            "--act",
            choices=("per-token", "per-tensor"),
            default="per-token",
            help="activations: one dynamic scale per token (accurate, default) or one static scale per tensor",
        )
    command.add_argument(
        "--keep-float",
        metavar="auto|none|ROLES",
        default="auto",
        help="with static scales: linears to leave in float. auto (default): those whose input one static scale would "
        "ruin, by the act scales; none; or roles, as in o,down",
    )


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    settings = SmoothingSettings(arguments.alpha, arguments.groups)
    from exporters.export import export
    from recipes.pipeline import source_of
    from smoothquant.workspace import load_manifest

    model = options.open_model(arguments, arguments.model, ui)
    if arguments.target == "onnx":
        export_onnx.check(arguments)
    if arguments.target == "trtllm":
        settings = export_trtllm.settings(arguments, model)
    plain = arguments.target == "onnx" and arguments.float
    if plain:
        source = source_of(model, None, SmoothingSettings(groups="none"))
    else:
        source = source_of(model, arguments.act_scales, settings)
    kept = _kept(arguments, source) if "keep_float" in arguments else ()
    if kept:
        why = ", since one static scale would ruin them (--keep-float)" if arguments.keep_float == "auto" else ""
        ui.note(f"{len(kept)} linears stay in float{why}: {listed(kept)}")
    with ui.progress(f"export {arguments.target}") as progress:
        export(source, [_writer(arguments, model, kept)], overwrite=arguments.overwrite, progress=progress)
    if arguments.target == "trtllm":
        export_trtllm.notes(arguments, source, ui)
    if arguments.target == "onnx":
        export_onnx.notes(arguments, ui)
    manifest = load_manifest(arguments.out)
    size = sum(manifest["files"].values())
    ui.result({"out": arguments.out, "bytes": size, "manifest": manifest})
    ui.say(f"{arguments.out}: {size / 1e6:,.1f} MB, from {model.checkpoint.nbytes / 1e6:,.1f} MB")


def _kept(arguments: argparse.Namespace, source: Source) -> tuple[str, ...]:
    """Linears to leave in float."""
    from smoothquant.static import linears_to_keep

    if arguments.act in (None, "per-token"):
        if arguments.keep_float not in ("auto", "none"):
            raise UserError(
                f"--keep-float {arguments.keep_float} without static activations",
                expected="--act per-tensor",
                do="drop --keep-float: one scale per token needs no linear in float",
            )
        return ()
    return linears_to_keep(arguments.keep_float, source.model, source.input_absmax, source.settings)


def _writer(arguments: argparse.Namespace, model: Model, kept: tuple[str, ...]) -> Writer:
    if arguments.target == "trtllm":
        return export_trtllm.writer(arguments, model)
    if arguments.target == "hf":
        import torch

        from exporters.huggingface import SmoothedWriter

        return SmoothedWriter(arguments.out, getattr(torch, arguments.dtype) if arguments.dtype else None)
    if arguments.target == "w8a8":
        from exporters.huggingface import W8A8Writer

        return W8A8Writer(arguments.out, arguments.act, kept=kept)
    return export_onnx.writer(arguments, kept)
