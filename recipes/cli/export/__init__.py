"""smoothquant export TARGET, or --target for each of several: smooth and quantize into others' formats, in one pass.

A target is a file in this folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from recipes.cli import options
from recipes.cli.export.by_plan import add_plan, is_by_plan, left_in_float, plan_of
from recipes.cli.export.chosen import Chosen, chosen
from recipes.cli.export.hf import HuggingFace
from recipes.cli.export.modelopt import ModelOpt
from recipes.cli.export.onnx import Onnx
from recipes.cli.export.target import ExportTarget, note_guess
from recipes.cli.export.trtllm import TensorRTLLM
from recipes.cli.export.w8a8 import W8A8
from recipes.cli.forms import CommandParser
from recipes.cli.ui import Ui
from smoothquant.errors import UserError

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from exporters.export import Source, Writer

TARGETS: tuple[ExportTarget, ...] = (HuggingFace(), W8A8(), ModelOpt(), Onnx(), TensorRTLLM())
EPILOG = """\
several formats in one pass over the layers, each in its folder DIR/TARGET; options of a format stand behind its name:
  smoothquant export --target w8a8 --target onnx:act=both,dtype=fp16 --target trtllm:tp=2 MODEL ACT_SCALES --out DIR
"""


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    export: CommandParser = commands.add_parser(
        "export",
        help="smooth and quantize a model into a format, or several",
        description="Smooth and quantize a model, layer by layer, into a format. Memory is a layer, not a model; an "
        "interrupted export goes on at the layer where it stopped.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ",".join(target.name for target in TARGETS)
    targets: argparse._SubParsersAction = export.add_subparsers(dest="target", metavar=f"{{{names}}}", required=True)
    for target in TARGETS:
        command = targets.add_parser(target.name, parents=[common], help=target.summary, description=target.description)
        _add_options(command, "folder to make")
        target.add_options(command)
        command.set_defaults(run=partial(_run_one, target))
    several = argparse.ArgumentParser(
        prog=export.prog,
        parents=[common],
        description="Smooth and quantize a model into several formats in one pass: each layer is read, smoothed, "
        "checked and quantized once. Each format is whole or absent by itself.",
    )
    several.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="TARGET[:OPTION=VALUE,...]",
        help=f"of {names}, with the options that smoothquant export TARGET --help lists, without their dashes, as in "
        "onnx:act=both,dtype=fp16; given once for each format",
    )
    _add_options(several, "folder for the folders to make: DIR/TARGET for each")
    several.set_defaults(run=_run_several)
    export.forms["--target"] = several


def _add_options(command: argparse.ArgumentParser, out: str) -> None:
    """Add what every export takes. out: help for --out."""
    command.add_argument("model", metavar="MODEL", help="Hugging Face model folder")
    command.add_argument(
        "act_scales",
        metavar="ACT_SCALES",
        nargs="?",
        help="from smoothquant calibrate, or the published .pt form; not needed for --groups none with per-token "
        "activations, nor for a float graph; a plan, which has its own, may stand in its place",
    )
    command.add_argument("--out", required=True, metavar="DIR", help=out)
    options.add_smoothing(command, "that of the recipe for the model's family and size")
    add_plan(command)
    options.add_memory(command, "a matrix is read, smoothed, quantized and written some rows at a time")
    options.add_family(command)
    options.add_overwrite(command)


def _run_one(target: ExportTarget, arguments: argparse.Namespace, ui: Ui) -> None:
    [found] = _export([Chosen(target, arguments, target.name, arguments.out)], arguments, ui)
    ui.result(found)


def _run_several(arguments: argparse.Namespace, ui: Ui) -> None:
    from smoothquant.outputs import check_holds_outputs

    asked = chosen(arguments.target, TARGETS, arguments.out)
    check_holds_outputs(arguments.out)
    found = dict(zip((one.target.name for one in asked), _export(asked, arguments, ui), strict=True))
    ui.result({"out": arguments.out, "targets": found})


def _export(asked: Sequence[Chosen], arguments: argparse.Namespace, ui: Ui) -> list[dict]:
    """Export to all targets in one pass. Returns the results, for programs. arguments: those that all share."""
    from builders.readers import check_served, facts_of
    from exporters.export import export
    from smoothquant.memory import for_export

    memory = options.memory(arguments)
    model = options.open_model(arguments, arguments.model, ui)
    alpha, by = options.usual_alpha(model)
    budget = for_export(model, memory, planned=is_by_plan(arguments))
    plan = plan_of(arguments, model)
    every = [one.within(arguments) for one in asked]
    sources = [one.target.source(its, model, plan, alpha) for one, its in zip(asked, every, strict=True)]
    source = replace(_shared(asked, sources), budget=budget)
    writers = []
    for one, its in zip(asked, every, strict=True):
        with ui.about(one.target.name if len(asked) > 1 else ""):
            writers.append(one.target.writer(its, source, ui))
        if one.target.form:
            check_served(facts_of(one.target.form, writers[-1].schemes[0], model.checkpoint.config))
    with ui.progress(f"export {', '.join(one.target.name for one in asked)}") as progress:
        export(source, writers, overwrite=arguments.overwrite, progress=progress)
    if arguments.alpha is None and plan is None and source.settings.groups != "none":
        ui.note(f"alpha {alpha}, {by}; --alpha sets another")
    results = []
    for one, its, writer in zip(asked, every, writers, strict=True):
        with ui.about(one.target.name if len(asked) > 1 else ""):
            results.append(_told(one, its, source, writer, ui))
    return results


def _shared(asked: Sequence[Chosen], sources: Sequence[Source]) -> Source:
    """What one pass over the layers starts from. Raises UserError for targets that need passes of their own."""
    facts = [source.settings.as_dict() | {"act_scales": source.fingerprints.get("act_scales")} for source in sources]
    for one, its in zip(asked, facts, strict=True):
        others = [name for name, value in its.items() if value != facts[0][name]]
        if others:
            [here, there] = [", ".join(f"{name} {found[name]}" for name in others) for found in (its, facts[0])]
            raise UserError(
                f"--target {one.words} smooths with {here}, and --target {asked[0].words} with {there}",
                expected="one smoothing for all targets: each layer is smoothed once",
                do=f"make that one by itself: smoothquant export {one.target.name}",
            )
    return sources[0]


def _told(one: Chosen, arguments: argparse.Namespace, source: Source, writer: Writer, ui: Ui) -> dict:
    """Say what a target's reader must know. Returns its result, for programs."""
    from builders.readers import facts_of, in_short
    from exporters.export import holds_float16
    from smoothquant.outputs import load_manifest

    target, checkpoint = one.target, source.model.checkpoint
    target.notes(arguments, source, ui)
    if source.plan and (ends := left_in_float(arguments, source.plan)):
        ui.note(f"the plan has {ends} in INT8: this format has that in float")
    note_guess(arguments, writer.schemes, source, ui)
    if holds_float16(writer, source) and not source.held_absmax:
        ui.note(
            "float16 holds nothing beyond 65504, and nothing here says how far this model reaches: give act scales "
            "made by smoothquant calibrate, or validate the engine on a GPU"
        )
    manifest = load_manifest(one.out)
    ui.done(one.out, f"{one.out}: {manifest.nbytes / 1e6:,.1f} MB, from {checkpoint.nbytes / 1e6:,.1f} MB")
    if target.form:
        facts = facts_of(target.form, writer.schemes[0], checkpoint.config)
        ui.say(f"servers: {in_short(facts)} (smoothquant check {one.out} --for SERVER)")
    return {"out": one.out, "bytes": manifest.nbytes, "manifest": manifest.as_dict()}
