"""smoothquant search: the best W8A8 form of a model, found by measurement."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli import calibrate, options
from recipes.cli.ui import Ui
from smoothquant.errors import UserError
from smoothquant.scheme import ACTIVATIONS, CACHES, EMBEDDINGS, HEADS, PER_TOKEN, quantized_names, scheme_of
from smoothquant.settings import GROUPS

if TYPE_CHECKING:
    from act_scales.search import Wanted
    from smoothquant.artifacts.plan import PlanFacts
    from smoothquant.model import Model

USUAL = {"per-token": 0.05, "per-tensor": 0.1}  # the share of the bytes for linears in float
AUTO = "auto"  # an output head, or an embedding, in INT8 where it costs no more than
AUTO_LIMIT = 1e-3  # in KL
GIB = 1 << 30


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "search",
        parents=[common],
        help="find scales, rounding and linears in float by measurement",
        description="Run a text through the model, layer by layer. For every group of linears try no smoothing, alphas "
        "and scales that balance the rounding of activations against that of weights, in the target's own arithmetic; "
        "round the weights with error feedback where that is nearer to the float model; measure what linears in float "
        "buy. A layer is in memory, as it is stored and in float32, and beside it what --hessian-memory says. The last "
        "sequences of the text, up to 8, only judge. The plan holds ranges, scales and rounded weights: smoothquant "
        "export FORMAT MODEL --plan PLAN needs nothing else. An interrupted search goes on near where it stopped.",
    )
    command.add_argument("model", metavar="MODEL", help="Hugging Face model folder")
    options.add_text(command, samples=40, length=512)
    command.add_argument("--out", required=True, metavar="PLAN", help="folder of the plan to write")
    command.add_argument(
        "--act",
        choices=quantized_names(ACTIVATIONS),
        default=PER_TOKEN.activations.form,
        help="activations: one dynamic scale per token, or one static scale per tensor (default %(default)s)",
    )
    command.add_argument("--kv", choices=tuple(CACHES), default="float", help="KV cache (default %(default)s)")
    command.add_argument(
        "--lm-head",
        choices=(*HEADS, AUTO),
        default="float",
        help="output head; int8 is for export onnx: its input is smoothed as well, and its weight rounded by what that "
        f"costs. auto: int8 where that costs a KL of at most {AUTO_LIMIT:g} (default %(default)s)",
    )
    command.add_argument(
        "--embedding",
        choices=(*EMBEDDINGS, AUTO),
        default="float",
        help="rows of the embedding; int8 is for export onnx. auto: int8 where that costs a KL of at most "
        f"{AUTO_LIMIT:g}, but float beside a float head that it is tied to (default %(default)s)",
    )
    command.add_argument(
        "--groups",
        choices=[name for name in GROUPS if name != "none"],
        default="default",
        help="what may be smoothed. default: norm -> linears, v -> o, up -> down; paper: norm -> linears only",
    )
    kept = command.add_mutually_exclusive_group()
    kept.add_argument(
        "--keep-float",
        metavar="none|N%",
        help="linears to leave in float: those that win most per byte, up to N%% of the bytes of all linears in INT8 "
        "(default: 5%% with activations per token, 10%% with static ones)",
    )
    kept.add_argument(
        "--target-kl",
        type=float,
        metavar="KL",
        help="leave as few linears in float as reach this KL from the float model, on the sequences that judge",
    )
    command.add_argument(
        "--hessian-memory",
        type=float,
        default=8,
        metavar="GIB",
        help="GiB for the second moments of a layer's inputs; below what they need they are taken in diagonal blocks "
        "(default %(default)s)",
    )
    command.add_argument(
        "--report", metavar="FILE.html", help="write a page with plots of what was tried and what each choice gave"
    )
    options.add_device(command)
    options.add_family(command)
    options.add_overwrite(command)
    options.share_team(command)
    command.set_defaults(run=run)


def wanted_of(arguments: argparse.Namespace, model: Model) -> Wanted:
    """What these options ask for. Raises UserError for numbers out of range."""
    from act_scales.search import Wanted
    from smoothquant.capacity import FOLDED, FOR_CACHE
    from smoothquant.sensitivity import sizes
    from smoothquant.static import budget_of, check_budget

    alpha, _ = options.usual_alpha(model)
    asked, budget = arguments.keep_float, 0.0
    if asked is None and arguments.target_kl is None:
        budget = USUAL[arguments.act]
    elif asked not in (None, "none"):
        share = budget_of(asked)
        if share is None:
            raise UserError(f"--keep-float {asked}", expected="none, or a share of the bytes, as in 5%")
        check_budget(asked, share, sizes(model))
        budget = share
    if arguments.target_kl is not None and not 0 < arguments.target_kl < float("inf"):
        raise UserError(f"--target-kl {arguments.target_kl}", expected="a number above 0, as 0.005")
    if not 0 < arguments.hessian_memory < 1 << 20:
        raise UserError(f"--hessian-memory {arguments.hessian_memory}", expected="GiB, above 0")
    capacity = FOR_CACHE if CACHES[arguments.kv].quantized else FOLDED
    head, embedding = ("int8" if asked == AUTO else asked for asked in (arguments.lm_head, arguments.embedding))
    head_limit, embedding_limit = (
        AUTO_LIMIT if asked == AUTO else float("inf") for asked in (arguments.lm_head, arguments.embedding)
    )
    return Wanted(
        scheme_of(arguments.act, kv_cache=arguments.kv, head=head, embedding=embedding),
        capacity.settings(model, alpha, arguments.groups),
        budget,
        arguments.target_kl,
        int(arguments.hessian_memory * GIB),
        head_limit,
        embedding_limit,
    )


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from act_scales.search import search
    from act_scales.store import load_act_scales
    from recipes.pipeline import write_page_of
    from smoothquant.memory import check_search

    _check_report(arguments)
    model = options.open_model(arguments, arguments.model, ui)
    check_search(model)
    wanted = wanted_of(arguments, model)
    calibrate.note_what_is_folded(ui, model)
    text = options.load_text(arguments, ui, arguments.text, model, arguments.samples, arguments.length)
    with ui.progress("search") as progress:
        plan = search(
            model,
            text,
            arguments.out,
            wanted,
            device=arguments.device,
            overwrite=arguments.overwrite,
            team=arguments.team,
            progress=progress,
        )
    if arguments.report and arguments.team.leads:
        write_page_of(plan, model, arguments.report)
    calibrate.warn_of_silence(ui, load_act_scales(plan.act_scales), model)
    show(ui, plan.facts)
    ui.result(
        {
            "out": arguments.out,
            "fingerprint": plan.fingerprint,
            "chosen": plan.facts.chosen,
            "curve": [vars(one) for one in plan.facts.curve],
            "float_linears": list(plan.float_linears),
        }
    )
    scheme = plan.facts.scheme
    onnx = any(part.quantized for part in (scheme.kv_cache, scheme.head, scheme.embedding))
    form = "onnx" if onnx else "w8a8"  # which has none of them
    ui.done(arguments.out, f"{arguments.out}: try  smoothquant export {form} {arguments.model} --plan {arguments.out}")


def _check_report(arguments: argparse.Namespace) -> None:
    """Raise OutputError for a --report that could not be written after the search."""
    from pathlib import Path

    from builders.validate.report import check_report
    from smoothquant.errors import OutputError

    if not arguments.report:
        return
    if Path(arguments.report).resolve().is_relative_to(Path(arguments.out).resolve()):
        raise OutputError(
            f"--report {arguments.report} lies inside --out {arguments.out}",
            expected="a file apart from the plan, whose folder holds what exports read",
            do="choose another --report",
        )
    check_report(Path(arguments.report), "--report")


def show(ui: Ui, facts: PlanFacts) -> None:
    """Show the models that were run end to end, and what linears in float buy."""
    heads = []  # the model with the head that was not taken
    if facts.head:
        int8 = facts.scheme.head.quantized
        heads = [("float head", facts.head.in_float) if int8 else ("INT8 head", facts.head.in_int8)]
    made = [*(("trial", one) for one in facts.candidates), *heads, *(("whole text", one) for one in facts.curve)]
    made += [("INT8 embedding", facts.embedding.in_int8)] if facts.embedding else []
    rows = [
        (kind, one.name, f"{one.share:.1%}", f"{one.kl:.4f}", f"{one.perplexity_ratio - 1:+.2%}", f"{one.top1:.1%}")
        for kind, one in made
    ]
    ui.table(
        "Search",
        ("made from", "scales", "in float", "KL", "perplexity", "top-1"),
        rows,
        caption=f"on {facts.apart:,} tokens that only judge; trials: made from {facts.trial:,}, on some of those",
    )
