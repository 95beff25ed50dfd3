"""smoothquant run: search or calibrate, export, build and validate, by a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from recipes.cli import calibrate, estimate, options, search, validate
from recipes.cli.ui import Ui
from recipes.targets import TARGETS, hold_embedding
from smoothquant.scheme import ACTIVATIONS, EMBEDDINGS, HEADS, PER_TOKEN, quantized_names, scheme_of

if TYPE_CHECKING:
    from act_scales.search import Wanted
    from act_scales.text import Text
    from recipes.recipe import Recipe
    from smoothquant.scheme import Scheme
    from smoothquant.settings import SmoothingSettings

HELDOUT = 32  # sequences


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "run",
        parents=[common],
        help="all of it by a recipe, resumable",
        description="Search, smooth, quantize, export, build and validate; without a search, calibrate first. All "
        "targets share one search or calibration, one pass over the layers and one pass of the float model. Run again "
        "with the same inputs, a finished step is not done again and an interrupted one goes on. Recipes: smoothquant "
        "recipes.",
    )
    command.add_argument("recipe", metavar="RECIPE", help="as llama-2-7b, or llama for any model of the family")
    command.add_argument("--model", required=True, metavar="MODEL", help="Hugging Face model folder")
    options.add_text(command, samples=None, length=None)
    command.add_argument(
        "--heldout",
        metavar="TEXT",
        help=f"text to validate on (default: the last {HELDOUT} sequences of --text, which are not calibrated on)",
    )
    command.add_argument(
        "--target",
        choices=tuple(TARGETS),
        action="append",
        help="what to make and validate; may be given several times (default: onnxruntime, and a w8a8 checkpoint that "
        "is not validated). onnxruntime, openvino, tensorrt: an engine, tensorrt for the GPU of this machine; "
        "tensorrt-llm: a checkpoint, checked and validated, of which build tensorrt-llm makes the engine; w8a8: a "
        "compressed-tensors checkpoint, which transformers validates with the whole model in memory",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for everything that is made")
    options.add_smoothing(command, "the recipe's")
    command.add_argument(
        "--act",
        choices=quantized_names(ACTIVATIONS),
        default=PER_TOKEN.activations.form,
        help="activation scales (default %(default)s)",
    )
    command.add_argument(
        "--no-search",
        action="store_true",
        help="take the recipe's alpha for all groups, and round to nearest. So do --alpha and --groups; else scales, "
        "rounding, linears in float and, where an engine may have them in INT8, output head and embedding are searched "
        "(smoothquant search), which takes as long as about six calibrations",
    )
    options.add_memory(
        command,
        "of calibration, exports and the float model of validation, each by itself, as their commands have it; engines "
        "and who builds them are not counted, and a search has no such bound",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="make nothing: check what a run checks before any work, and estimate its memory, disk and time",
    )
    options.add_family(command)
    options.add_overwrite(command)
    command.set_defaults(run=run)


def _wanted(asked: Sequence[str] | None, usual: Sequence[str]) -> dict[str, bool]:
    """Targets, and whether each is validated: all that a user asked for; of a recipe's own, those whose validation does
    not hold the whole model in memory."""
    return dict.fromkeys(asked, True) if asked else {name: not TARGETS[name].readers for name in usual}


def _searched(
    arguments: argparse.Namespace, recipe: Recipe, settings: SmoothingSettings, scheme: Scheme, text: Text, ui: Ui
) -> Wanted | None:
    """What a search is to find; None where options say alpha or groups, or that there is none, and for a recipe with
    steps of its own."""
    from act_scales.search import LEAST_SEQUENCES, Wanted
    from smoothquant.steps import DEFAULT

    if arguments.no_search or arguments.alpha is not None or arguments.groups is not None:
        return None
    if recipe.steps != DEFAULT:
        return None
    if len(text.sequences) < LEAST_SEQUENCES:
        ui.note(f"{len(text.sequences)} sequences are too few to search on: the recipe's alpha it is")
        return None
    budget = search.USUAL[scheme.activations.form]
    targets = [TARGETS[name] for name in _wanted(arguments.target, recipe.targets)]
    scheme = replace(scheme, head=HEADS["int8"]) if any(target.head for target in targets) else scheme
    scheme = replace(scheme, embedding=EMBEDDINGS["int8"]) if hold_embedding(targets) else scheme
    limit = search.AUTO_LIMIT
    return Wanted(scheme, settings, budget, head_limit=limit, embedding_limit=limit)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from pathlib import Path

    from act_scales.store import load_act_scales
    from recipes import pipeline

    memory = options.memory(arguments)
    model = options.open_model(arguments, arguments.model, ui)
    recipe = options.find_recipe(arguments.recipe, model, ui)
    given = {"samples": arguments.samples, "length": arguments.length}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    settings = recipe.settings(model, arguments.alpha, arguments.groups)
    wanted = recipe.samples + (0 if arguments.heldout else HELDOUT)
    text = options.load_text(arguments, ui, arguments.text, model, wanted, recipe.length)
    if arguments.heldout:
        heldout = options.load_text(arguments, ui, arguments.heldout, model, HELDOUT, recipe.length)
    else:
        text, heldout = pipeline.split_text(text, HELDOUT)
    scheme = scheme_of(arguments.act)
    searched = _searched(arguments, recipe, settings, scheme, text, ui)
    outputs = tuple(
        pipeline.Output(
            name,
            TARGETS[name],
            settings,
            scheme,
            steps=recipe.steps,
            thresholds=recipe.thresholds if validated else None,
            searched=searched,
        )
        for name, validated in _wanted(arguments.target, recipe.targets).items()
    )
    job = pipeline.RecipeRun(model, text, heldout, Path(arguments.out), outputs, memory)
    scales = "scales by search" if searched else f"alpha {settings.alpha}"
    ui.note(f"recipe {recipe.name}: {scales}, {len(text.sequences)} x {recipe.length} tokens")
    if arguments.dry_run:
        estimate.dry_run(ui, job)
        return
    made = pipeline.run(job, ui.progress, overwrite=arguments.overwrite)
    for file in made.act_scales:
        calibrate.warn_of_silence(ui, load_act_scales(file), model)
    for plan in made.plans:
        search.show(ui, plan.facts)
    validate.show(ui, made.validations)
    report = job.out / pipeline.REPORT
    ui.result(
        {
            "engines": {label: str(folder) for label, folder in made.folders.items()},
            "report": str(report),
            "plans": [str(plan.folder) for plan in made.plans],
            "validations": [validate.summary(validation) for validation in made.validations],
        }
    )
    for output in outputs:
        folder = made.folders[output.label]
        ui.say(f"{output.label}  {folder}")
        if output.target.then:
            ui.say(f"next  {output.target.then.format(folder=folder)}")
    for plan in made.plans:
        ui.say(f"plan  {plan.folder}, shown by {pipeline.page_beside(plan.folder)}")
    ui.say(f"report  {report}")
    validate.raise_if_missed(made.validations)
