"""--plan of `smoothquant export`: what a search has chosen stands in for the options that say it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from smoothquant.errors import UserError

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from smoothquant.model import Model
    from smoothquant.plan import Plan

CHOSEN = {"act_scales": "ACT_SCALES", "alpha": "--alpha", "groups": "--groups"}


def add_plan(command: argparse.ArgumentParser) -> None:
    """Add --plan, which `plan_of` reads."""
    command.add_argument(
        "--plan",
        metavar="PLAN",
        help="folder made by smoothquant search: its scales, its rounded weights, its linears in float and its target, "
        "in place of ACT_SCALES, --alpha and --groups",
    )


def is_by_plan(arguments: argparse.Namespace) -> bool:
    """Whether an export is by a plan, which may stand in the place of ACT_SCALES."""
    return arguments.plan is not None or (arguments.act_scales is not None and os.path.isdir(arguments.act_scales))


def plan_of(arguments: argparse.Namespace, model: Model) -> Plan | None:
    """The plan that --plan names, or that stands in the place of ACT_SCALES, which is this model's; None without one.
    Raises UserError for options that the plan stands in for."""
    if arguments.plan is None and is_by_plan(arguments):
        arguments.plan, arguments.act_scales = arguments.act_scales, None  # scales are a file, a plan is a folder
    if arguments.plan is None:
        return None
    from smoothquant.plan import read_plan

    for name, option in CHOSEN.items():
        value = getattr(arguments, name, None)
        if value is not None:
            raise UserError(
                f"--plan with {option} {value}",
                expected="one of them: a plan says what is folded",
                do=f"leave {option} away, or --plan",
            )
    return read_plan(arguments.plan).for_model(model)


def take_precisions(arguments: argparse.Namespace, plan: Plan) -> None:
    """Let precisions that a target's options leave open be the plan's."""
    scheme = plan.facts.scheme
    precisions = {"act": scheme.activations.form, "kv": scheme.kv_cache.dtype, "lm_head": scheme.head.dtype}
    precisions |= {"embedding": scheme.embedding.dtype}  # and whatever the format has no option for stays in float
    for name, form in precisions.items():
        if name in arguments and getattr(arguments, name) is None:
            setattr(arguments, name, form)


def left_in_float(arguments: argparse.Namespace, plan: Plan) -> str:
    """What a plan has in INT8 beside the linears and this format has in float, in words; nothing if there is nothing.
    arguments: those that `take_precisions` has changed."""
    scheme = plan.facts.scheme
    ends = {"lm_head": ("its output head", scheme.head), "embedding": ("its embedding", scheme.embedding)}
    return " and ".join(words for name, (words, one) in ends.items() if one.quantized and name not in arguments)
