"""smoothquant estimate: memory, disk and time of every step, before a long run."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import TYPE_CHECKING

from recipes.cli import options
from recipes.cli.export import TARGETS
from recipes.cli.export.chosen import Chosen, chosen
from recipes.cli.ui import Ui
from smoothquant.errors import UserError

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from exporters.export import Source
    from recipes.estimate import Estimate, Export, Tokens
    from recipes.estimate.steps import StepCost
    from recipes.pipeline import RecipeRun
    from smoothquant.model import Model

USUAL = ("w8a8", "onnx")
HELDOUT = 32  # sequences
HERE, ELSEWHERE = {"onnx": "onnxruntime"}, {"trtllm": "tensorrt-llm"}  # target -> the engine that is built from it
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "estimate",
        parents=[common],
        help="memory, disk and time of every step, before a long run",
        description="Say what calibrate, search, export, build and validate take for a model: memory by formula, disk "
        "by the layout of the files, time by rates that are measured here, within some seconds. The weights need not "
        "be there: config.json is enough. A run that the disk of --out cannot hold is refused.",
    )
    command.add_argument("model", metavar="MODEL", help="Hugging Face model folder, or a folder with config.json alone")
    command.add_argument(
        "--target",
        action="append",
        metavar="TARGET[:OPTION=VALUE,...]",
        help=f"as in smoothquant export; given once for each format (default: {' and '.join(USUAL)})",
    )
    options.add_text(command, samples=128, length=512, required=False)
    command.add_argument(
        "--out",
        dest="place",  # nothing is written there: it may be the model's own folder
        default=".",
        metavar="DIR",
        help="folder for everything that would be made (default: here)",
    )
    options.add_smoothing(command, "that of the recipe for the model's family and size")
    options.add_family(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from pathlib import Path

    from act_scales.search import Wanted
    from recipes.estimate import CALIBRATE, SEARCH, EstimatedRun, estimate
    from smoothquant.files import check_place

    asked, out = chosen(arguments.target or USUAL, TARGETS, arguments.place), Path(arguments.place)
    check_place(out / ".smoothquant", "--out", arguments.place)
    model = _open(arguments, ui)
    text = _tokens(arguments, model, ui)
    exports = [_export(one, arguments, model, ui) for one in asked]
    heldout = text.of(min(HELDOUT, text.sequences))
    found = estimate(EstimatedRun(model, out, text, heldout, exports, (CALIBRATE, SEARCH), Wanted.memory))
    show(ui, found, text)
    found.check_disk()


def dry_run(ui: Ui, job: RecipeRun) -> None:
    """Show what a recipe's run would take. Raises UserError for what cannot be made here, or held by the disk."""
    from recipes.estimate import estimate
    from recipes.estimate.recipe_run import of_recipe

    asked = of_recipe(job)
    found = estimate(asked)
    show(ui, found, asked.text)
    found.check_disk()


def show(ui: Ui, found: Estimate, text: Tokens) -> None:
    """Show an estimate, and what of it this machine cannot hold. text: that it is made for."""
    rates = [(name, f"{_short(rate.value)}{rate.unit}", rate.how) for name, rate in found.rates.table().items()]
    ui.table("What this machine does", ("", "a second", "measured"), rates)
    rows = [_row(step) for step in found.steps]
    ui.table(
        "Estimate",
        ("step", "memory", "most of it", "disk read", "disk written", "time", "bounded by"),
        rows,
        caption=f"{text.sequences} x {text.length} tokens; {found.rates.cores} cores",
    )
    for ranges in found.ways:
        needed, seconds = found.disk(ranges), found.seconds(ranges)
        ui.say(f"by {ranges}: {_bytes(needed)} of disk ({_bytes(found.free_disk)} are free), {_time(seconds)} together")
        if needed > found.free_disk:
            ui.warn(f"{found.out}: by {ranges}, {_bytes(needed)} are needed, and {_bytes(found.free_disk)} are free")
    for step in found.too_large:
        ui.warn(f"{step.step}: {_bytes(step.peak)} of memory are needed, and {_bytes(found.free_memory or 0)} are free")
    ui.result(found.as_dict())


def _open(arguments: argparse.Namespace, ui: Ui) -> Model:
    """The model, or what config.json alone says of it."""
    from pathlib import Path

    from recipes import families
    from smoothquant.announced import has_weights

    if not (Path(arguments.model) / "config.json").exists() or has_weights(Path(arguments.model)):
        return options.open_model(arguments, arguments.model, ui)
    model = families.open_announced(
        arguments.model, arguments.family, length=arguments.max_length, trust_family=arguments.trust_family
    )
    for line in model.checkpoint.notes:
        ui.note(line)
    return model


def _tokens(arguments: argparse.Namespace, model: Model, ui: Ui) -> Tokens:
    """How much text a run gets. Raises UserError for as much as no run can have."""
    from recipes.estimate import Tokens

    most = model.geometry.max_positions
    if not 1 <= arguments.length <= most:
        raise UserError(f"--length {arguments.length}", expected=f"1 to {most}, this model's positions")
    if arguments.samples < 1:
        raise UserError(f"--samples {arguments.samples}", expected="1 or more")
    if arguments.text is None:
        return Tokens(arguments.samples, arguments.length)
    text = options.load_text(arguments, ui, arguments.text, model, arguments.samples, arguments.length)
    return Tokens(len(text.sequences), max(map(len, text.sequences)))


def _export(one: Chosen, arguments: argparse.Namespace, model: Model, ui: Ui) -> Export:
    """The export of a target. Raises UserError for what it cannot hold."""
    from recipes.estimate import Export

    its = one.within(arguments)
    with ui.about(one.target.name):
        if getattr(its, "keep_float", None) is None and "keep_float" in its:
            its.keep_float = "none"  # measured on the weights
        writer = one.target.writer(its, _source(one, its, model), ui)
    static = any(scheme.activations.static for scheme in writer.schemes)
    if static and "keep_float" in its:
        ui.note(f"{one.words}: linears that stay in float by measurement are not counted: they come on top")
    here, name = HERE.get(one.target.name), one.target.name
    gpu = [ELSEWHERE[name]] if name in ELSEWHERE else []
    if getattr(its, "engine", None) == "tensorrt":
        here, gpu = None, [its.engine]
    return Export(name, writer, engines=(here,) if here else (), elsewhere=tuple(gpu), validated=int(bool(here)))


def _source(one: Chosen, arguments: argparse.Namespace, model: Model) -> Source:
    """What an export starts from, with ranges of ones in the place of those that no calibration has found yet."""
    import torch

    from exporters.export import Source

    alpha, _ = options.usual_alpha(model)
    capacity = one.target.smoothing(arguments, model)
    settings = capacity.settings(model, alpha if arguments.alpha is None else arguments.alpha, arguments.groups)
    ones, linears = torch.ones(1), dict(model.linears())
    return Source(
        model,
        settings,
        {name: ones.expand(columns) for name, (_, columns) in linears.items()},
        output_absmax={name: ones.expand(rows) for name, (rows, _) in linears.items()},
    )


def _row(step: StepCost) -> tuple[str, ...]:
    if step.seconds is None:
        return step.step, "", "", "", "", "?", step.note
    part, share = step.bound
    most = max(step.memory, key=lambda name: step.memory[name])
    held = f"{most} {step.memory[most] / step.peak:.0%}"
    scratch = f" (+ {_bytes(step.scratch)} meanwhile)" if step.scratch else ""
    written = f"{_bytes(step.written)}{scratch}"
    return step.step, _bytes(step.peak), held, _bytes(step.read), written, _time(step.seconds), f"{part} {share:.0%}"


def _bytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.0f} MB"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _short(value: float) -> str:
    """A number with three digits and the prefix of its unit."""
    for size, prefix in UNITS:
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
