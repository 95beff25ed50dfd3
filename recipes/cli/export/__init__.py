"""smoothquant export TARGET: smooth and quantize into others' formats. A target is a file in this folder."""

from __future__ import annotations

import argparse
from functools import partial

from recipes.cli import options
from recipes.cli.export.by_plan import add_plan, left_in_float
from recipes.cli.export.hf import HuggingFace
from recipes.cli.export.modelopt import ModelOpt
from recipes.cli.export.onnx import Onnx
from recipes.cli.export.target import ExportTarget, note_guess
from recipes.cli.export.trtllm import TensorRTLLM
from recipes.cli.export.w8a8 import W8A8
from recipes.cli.ui import Ui

TARGETS: tuple[ExportTarget, ...] = (HuggingFace(), W8A8(), ModelOpt(), Onnx(), TensorRTLLM())


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    export = commands.add_parser(
        "export",
        help="smooth and quantize a model into a format",
        description="Smooth and quantize a model, layer by layer, into a format. Memory is a layer, not a model; an "
        "interrupted export goes on at the layer where it stopped.",
    )
    names = ",".join(target.name for target in TARGETS)
    targets = export.add_subparsers(dest="target", metavar=f"{{{names}}}", required=True)
    for target in TARGETS:
        command = targets.add_parser(target.name, parents=[common], help=target.summary, description=target.description)
        command.add_argument("model", metavar="MODEL", help="Hugging Face model folder")
        command.add_argument(
            "act_scales",
            metavar="ACT_SCALES",
            nargs="?",
            help="from smoothquant calibrate, or the published .pt form; not needed for --groups none with per-token "
            "activations, nor for a float graph; a plan has its own",
        )
        command.add_argument("--out", required=True, metavar="DIR", help="folder to make")
        options.add_smoothing(command, "that of the recipe for the model's family and size")
        add_plan(command)
        target.add_options(command)
        options.add_family(command)
        options.add_overwrite(command)
        command.set_defaults(run=partial(run, target))


def run(target: ExportTarget, arguments: argparse.Namespace, ui: Ui) -> None:
    from builders.readers import check_served, facts_of, in_short
    from exporters.export import export, holds_float16
    from smoothquant.outputs import load_manifest

    model = options.open_model(arguments, arguments.model, ui)
    alpha, by = options.usual_alpha(model)
    source = target.source(arguments, model, alpha)
    writer = target.writer(arguments, source, ui)
    facts = facts_of(target.form, writer.schemes[0], model.checkpoint.config)
    if target.form:
        check_served(facts)
    with ui.progress(f"export {target.name}") as progress:
        export(source, [writer], overwrite=arguments.overwrite, progress=progress)
    if arguments.alpha is None and source.plan is None and source.settings.groups != "none":
        ui.note(f"alpha {alpha}, {by}; --alpha sets another")
    target.notes(arguments, source, ui)
    if source.plan and (ends := left_in_float(arguments, source.plan)):
        ui.note(f"the plan has {ends} in INT8: this format has that in float")
    note_guess(arguments, writer.schemes, source, ui)
    if holds_float16(writer, source) and not source.held_absmax:
        ui.note(
            "float16 holds nothing beyond 65504, and nothing here says how far this model reaches: give act scales "
            "made by smoothquant calibrate, or validate the engine on a GPU"
        )
    manifest = load_manifest(arguments.out)
    size = manifest.nbytes
    ui.result({"out": arguments.out, "bytes": size, "manifest": manifest.as_dict()})
    ui.done(arguments.out, f"{arguments.out}: {size / 1e6:,.1f} MB, from {model.checkpoint.nbytes / 1e6:,.1f} MB")
    if target.form:
        ui.say(f"servers: {in_short(facts)} (smoothquant check {arguments.out} --for SERVER)")
