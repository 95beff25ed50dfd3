"""smoothquant validate: an engine against the float logits of its model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING

from recipes.cli import options
from recipes.cli.ui import Ui
from smoothquant.errors import ThresholdError, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from builders.validate import Thresholds, Validation
    from smoothquant.model import Model

LIMITS = {  # field of Thresholds -> what its option's help says
    "kl_mean": "mean KL to the reference, nats per token, at most",
    "kl_p99": "99th percentile of the KL, at most",
    "top1": "share of tokens with the same likeliest successor, at least",
    "perplexity_ratio": "perplexity over the reference's, at most",
    "relative_error": "relative error of the logits, at most",
    "exactness_ratio": "distance to the exact W8A8 logits over PyTorch's, at most (runs the float64 reference)",
}

CLEAR = (
    "clear: top-1 without ambiguous tokens, whose two best reference logits lie closer than the 99th percentile of the "
    "engine's logit error"
)


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "validate",
        parents=[common],
        help="compare an engine with the float model on held-out text",
        description="Run engines and the float model on a text that was not calibrated on, and compare their logits. "
        "The float model runs layer by layer: one layer in memory. Exit status 1 if a threshold is missed; the "
        "smallest one that would have passed is told, and what to try. An interrupted run goes on near where it "
        "stopped: what it has found lies in FILE.smoothquant-work beside --out, or else --report, or else the first "
        "engine.",
    )
    command.add_argument(
        "engines",
        metavar="ENGINE",
        nargs="+",
        help="folder made by smoothquant build onnxruntime, openvino or tensorrt, or by export hf, w8a8, onnx or "
        "trtllm; or by another tool, a TensorRT-LLM checkpoint or an INT8 folder in compressed-tensors' or ModelOpt's "
        "form; several are compared side by side",
    )
    command.add_argument("--reference", required=True, metavar="MODEL", help="the float model that it was made from")
    command.add_argument(
        "--plan",
        metavar="PLAN",
        action="append",
        default=[],
        help="folder made by smoothquant search that an engine was exported by; may be given several times",
    )
    options.add_text(command, samples=32, length=512)
    command.add_argument(
        "--recipe",
        help="take the thresholds of this recipe (default: that for the model's family and size, unless thresholds are "
        "given)",
    )
    command.add_argument("--no-thresholds", action="store_true", help="measure only; the exit status tells nothing")
    for name, meaning in LIMITS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=f"threshold: {meaning}")
    command.add_argument("--exact", action="store_true", help="measure the distance to the exact (float64) W8A8 logits")
    options.add_memory(
        command,
        "matrices of the float model are read some rows at a time, and hidden states lie in mapped files; a layer of "
        "each W8A8 form is held as it is, and what the engines themselves hold is not counted",
    )
    options.add_device(command)
    command.add_argument("--report", metavar="FILE.html", help="write a report with plots")
    command.add_argument("--out", metavar="FILE.json", help="write the results, with everything that the plots show")
    options.add_family(command)
    options.share_team(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from pathlib import Path

    from act_scales.tokenizer import Encoder, has_tokenizer
    from builders.engine.protocol import FOREIGN
    from builders.validate import validate_engines
    from builders.validate.int8_folder import is_int8_folder
    from builders.validate.report import check_report
    from smoothquant.memory import for_validation
    from smoothquant.plan import read_plan

    for option, path in (("--report", arguments.report), ("--out", arguments.out)):
        if path:
            check_report(Path(path), option)
    memory = options.memory(arguments)
    model = options.open_model(arguments, arguments.reference, ui)
    for_validation(model, memory, arguments.length, len(arguments.engines))  # too little is refused before the text
    plans = [read_plan(folder).for_model(model) for folder in arguments.plan]
    limits = _limits(arguments, ui, model)
    text = options.load_text(arguments, ui, arguments.text, model, arguments.samples, arguments.length)
    for folder in map(Path, arguments.engines):
        if is_int8_folder(folder) and has_tokenizer(folder):
            options.check_tokens(text, Encoder(arguments.reference), Encoder(folder))
    names = [Path(folder).resolve().name for folder in arguments.engines]
    labels = names if len(set(names)) == len(names) else arguments.engines
    folders = dict(zip(labels, arguments.engines, strict=True))
    work = _work(arguments)
    with ui.progress("validate") as progress:
        found = validate_engines(
            folders,
            model,
            text,
            dict.fromkeys(folders, limits),
            plans=plans,
            exact=arguments.exact,
            device=arguments.device,
            work=work,
            memory=memory,
            team=arguments.team,
            progress=progress,
        )
    show(ui, found)
    for validation in found:
        if not validation.checks:
            ui.say(validation.verdict)
    if arguments.exact:
        for label in (validation.label for validation in found if validation.subject["engine"] == FOREIGN):
            ui.warn(f"{label}: no distance to the exact logits, because its smoothing is not recorded")
    ui.result({"validations": [summary(validation) for validation in found]})
    if arguments.team.leads:
        _write(arguments, ui, folders, found)
    raise_if_missed(found)


def _write(arguments: argparse.Namespace, ui: Ui, folders: Mapping[str, str | Path], found: list[Validation]) -> None:
    """Write what was found to where it was asked for, and into the engines' cards."""
    from builders.validate.card import note_measured
    from builders.validate.report import write_json, write_report
    from smoothquant.workroom import forget

    for validation in found:
        if note_measured(folders[validation.label], validation):
            ui.note(f"{folders[validation.label]}/README.md: now says what was measured")
    if arguments.report:
        write_report(arguments.report, found)
    if arguments.out:
        write_json(arguments.out, found)
    if work := _work(arguments):
        forget(work)


def _work(arguments: argparse.Namespace) -> Path | None:
    """What an interrupted validation is kept beside; None where that is an engine in a place that is read-only."""
    from pathlib import Path

    if arguments.out or arguments.report:
        return Path(arguments.out or arguments.report)
    engine = Path(arguments.engines[0]).resolve()
    return engine.with_name(f"{engine.name}.validation") if os.access(engine.parent, os.W_OK) else None


def show(ui: Ui, found: list[Validation]) -> None:
    """A table with a line per engine, and the verdict on every threshold."""
    header = ("", "perplexity", "ratio", "KL mean", "KL p99", "top-1", "clear", "ambiguous", "rel. error", "size")
    rows = [("reference", f"{found[0].metrics.reference_perplexity:.3f}", *[""] * 8)]
    for validation in found:
        metrics = validation.metrics
        rows.append(
            (
                validation.label,
                f"{metrics.perplexity:.3f}",
                f"{metrics.perplexity_ratio:.4f}",
                f"{metrics.kl_mean:.5f}",
                f"{metrics.kl_p99:.5f}",
                f"{metrics.top1:.2%}",
                "" if metrics.top1_clear is None else f"{metrics.top1_clear:.2%}",
                f"{metrics.ambiguous:.2%}",
                f"{metrics.relative_error:.2e}",
                f"{validation.subject['bytes'] / 1e6:,.1f} MB",
            )
        )
    ui.table(f"{found[0].subject['tokens']:,} tokens of {found[0].subject['text']}", header, rows, CLEAR)
    for validation in found:
        if validation.exactness:
            exactness = validation.exactness
            ui.say(
                f"{validation.label}: distance to the exact W8A8 logits {exactness.engine:.2e}, PyTorch's own float32 "
                f"{exactness.pytorch:.2e}, ratio {exactness.ratio:.2f}"
            )
        if validation.worst:
            worst = ", ".join(f"{linear.name} {linear.sqnr:.1f} dB" for linear in validation.worst)
            ui.say(f"{validation.label}: largest errors of linears (SQNR): {worst}")
        if validation.unexplained:
            ui.say(f"{validation.label}: {validation.unexplained}")
        for check in validation.checks:
            ui.say(f"{validation.label}: {check.sentence}")


def summary(validation: Validation) -> dict:
    """A validation without the data of its plots."""
    content = validation.as_dict()
    kept = ("label", "subject", "metrics", "exactness", "checks", "overflow", "unexplained", "passed", "advice")
    return {key: content[key] for key in kept} | {"worst": [asdict(linear) for linear in validation.worst]}


def raise_if_missed(found: list[Validation]) -> None:
    """Raise ThresholdError, which makes the exit status 1, if an engine misses a threshold."""
    missed = [validation.verdict for validation in found if validation.passed is False]
    if missed:
        raise ThresholdError("; ".join(missed))


def _limits(arguments: argparse.Namespace, ui: Ui, model: Model) -> Thresholds:
    """The thresholds that are given, on top of a recipe's if that is given; those of `of_model` if neither is."""
    from builders.validate import Thresholds
    from recipes.models import RECIPES
    from recipes.recipe import DEFAULT_THRESHOLDS, of_model

    given = {field.name: getattr(arguments, field.name) for field in fields(Thresholds)}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.no_thresholds:
        if given or arguments.recipe:
            raise UserError("--no-thresholds beside thresholds or a recipe", expected="one or the other")
        return Thresholds()
    if arguments.recipe:
        return replace(options.find_recipe(arguments.recipe, model, ui).thresholds, **given)
    if given:
        return Thresholds(**given)
    recipe = of_model(model, RECIPES)
    return recipe.thresholds if recipe else DEFAULT_THRESHOLDS
