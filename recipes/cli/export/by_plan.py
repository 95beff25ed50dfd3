"""--plan of `smoothquant export`: what a search has chosen stands in for the options that say it."""

from __future__ import annotations

import argparse
from collections.abc import Collection
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


def plan_of(arguments: argparse.Namespace, model: Model, embeddings: Collection[str]) -> Plan | None:
    """The plan that --plan names, which is this model's; None without one. Precisions that the options leave open
    become the plan's. embeddings: the precisions of the embedding that the format has. Raises UserError for options
    that the plan stands in for, and for an embedding that the format does not have."""
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
    plan = read_plan(arguments.plan).for_model(model)
    scheme = plan.facts.scheme
    precisions = {"act": scheme.activations.form, "kv": scheme.kv_cache.dtype, "lm_head": scheme.head.dtype}
    precisions |= {"embedding": scheme.embedding.dtype}
    for name, form in precisions.items():
        if name in arguments and getattr(arguments, name) is None:
            setattr(arguments, name, form)
    if arguments.embedding not in embeddings:
        raise UserError(
            f"{arguments.plan}: a plan with an embedding in {arguments.embedding}, which export onnx alone has",
            expected=f"an embedding in {', '.join(embeddings)}",
            do="add --embedding float, which leaves all else as it is, or export onnx",
        )
    return plan
