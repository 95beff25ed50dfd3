"""smoothquant run: calibrate, export, build and validate, by a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from recipes.cli import calibrate, options, validate
from recipes.cli.ui import Ui

HELDOUT = 32  # sequences


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "run",
        parents=[common],
        help="all of it by a recipe, resumable",
        description="Calibrate, smooth, quantize, export (W8A8 checkpoint and ONNX), build the engine, validate it. "
        "Run again with the same inputs, a finished step is not done again and an interrupted one goes on. "
        "Recipes: smoothquant recipes.",
    )
    command.add_argument("recipe", metavar="RECIPE", help="as llama-2-7b, or llama for any model of the family")
    command.add_argument("--model", required=True, metavar="MODEL", help="Hugging Face model folder")
    options.add_text(command, samples=None, length=None)
    command.add_argument(
        "--heldout",
        metavar="TEXT",
        help=f"text to validate on (default: the last {HELDOUT} sequences of --text, which are not calibrated on)",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for everything that is made")
    options.add_smoothing(command, alpha_default=None)
    command.add_argument(
        "--act", choices=("per-token", "per-tensor"), default="per-token", help="activation scales (default per-token)"
    )
    options.add_family(command)
    options.add_overwrite(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from dataclasses import replace
    from pathlib import Path

    from act_scales.store import load_act_scales
    from act_scales.text import load_text
    from recipes import pipeline
    from recipes.models import RECIPES
    from recipes.recipe import find

    recipe = find(arguments.recipe, RECIPES)
    recipe = replace(recipe, samples=arguments.samples or recipe.samples, length=arguments.length or recipe.length)
    settings = recipe.settings(arguments.alpha, arguments.groups)
    model = options.open_model(arguments, arguments.model, ui)
    if arguments.heldout:
        text = load_text(arguments.text, model.checkpoint.folder, recipe.samples, recipe.length)
        heldout = load_text(arguments.heldout, model.checkpoint.folder, HELDOUT, recipe.length)
    else:
        text, heldout = pipeline.split_text(arguments.text, model, recipe, HELDOUT)
    plan = pipeline.Plan(recipe, model, settings, text, heldout, Path(arguments.out), arguments.act)
    ui.note(f"recipe {recipe.name}: alpha {settings.alpha}, {len(text.sequences)} x {recipe.length} tokens")

    @contextmanager
    def step(name: str) -> Iterator[Callable[[int, int], None]]:
        with ui.progress(name) as progress:
            yield progress

    found = pipeline.run(plan, step, overwrite=arguments.overwrite)
    calibrate.warn_of_silence(ui, load_act_scales(plan.out / pipeline.ACT_SCALES))
    validate.show(ui, [found])
    engine, report = plan.out / "engine", plan.out / pipeline.REPORT
    ui.result({"engine": str(engine), "report": str(report), "validation": validate.summary(found)})
    ui.say(f"engine  {engine}\nreport  {report}")
    validate.raise_if_missed([found])
