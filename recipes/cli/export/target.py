"""What every target of `smoothquant export` is: a name, options, and what they come to."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from recipes.cli.export.by_plan import take_precisions
from recipes.cli.ui import Ui, listed
from smoothquant.capacity import FOLDED, Capacity
from smoothquant.errors import UserError
from smoothquant.scheme import ACTIVATIONS, Scheme, quantized_names

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from exporters.export import Source, Writer
    from smoothquant.model import Model
    from smoothquant.plan import Plan


class ExportTarget(ABC):
    """One format. name: on the command line; summary, description: for --help; form: what servers call it, where they
    read it as it is (`builders.readers`)."""

    name: ClassVar[str]
    summary: ClassVar[str]
    description: ClassVar[str]
    form: ClassVar[str] = ""

    @abstractmethod
    def add_options(self, command: argparse.ArgumentParser) -> None:
        """Add the options that this format alone has."""

    def smoothing(self, arguments: argparse.Namespace, model: Model) -> Capacity:
        """What the format holds of smoothing with these options. Raises UserError for options that contradict each
        other."""
        return FOLDED

    def source(self, arguments: argparse.Namespace, model: Model, plan: Plan | None, usual_alpha: float) -> Source:
        """The model with its act scales and smoothing settings, or with its plan. usual_alpha: the alpha if none is
        given. Raises UserError for settings that the format or the model cannot hold."""
        from recipes.pipeline import source_by_plan, source_of

        if plan:
            take_precisions(arguments, plan)
        capacity = self.smoothing(arguments, model)
        if plan:
            capacity.check(plan.facts.smoothing, model)
            return source_by_plan(model, plan)
        alpha = usual_alpha if arguments.alpha is None else arguments.alpha
        settings = capacity.settings(model, alpha, arguments.groups)
        return source_of(model, arguments.act_scales, settings)

    def measures(self, arguments: argparse.Namespace) -> bool:
        """Whether what one static scale costs is measured where no plan says it, which takes a layer in memory."""
        act = getattr(arguments, "act", None)
        static = act is not None and (act not in ACTIVATIONS or ACTIVATIONS[act].static)
        return static and is_measured(asked_float(arguments))

    @abstractmethod
    def writer(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> Writer:
        """The writer that these options ask for. Raises UserError for options that contradict each other."""

    def notes(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> None:  # noqa: B027 (most have none)
        """Say what the reader of the output must know."""


def add_activations(command: argparse.ArgumentParser, *more: str, help: str = "") -> None:
    """Add --act. more: choices beyond the two; help: on them."""
    command.add_argument(
        "--act",
        choices=(*quantized_names(ACTIVATIONS), *more),
        help="activations: one dynamic scale per token (accurate, default) or one static scale per tensor" + help,
    )


def add_keep_float(command: argparse.ArgumentParser) -> None:
    """Add --keep-float, which `with_kept` reads."""
    command.add_argument(
        "--keep-float",
        metavar="auto|none|N%|ROLES",
        help="linears to leave in float, with static scales or by a plan. auto (default): those whose rounding puts "
        "more than a thousandth of noise on the residual stream, by the act scales and the weights; N%%, as in 5%%: "
        "those that win most per byte, up to N%% of the bytes of all linears in INT8 (each costs its INT8 bytes once "
        "more in float16, three times more in float32); none; or roles, as in o,down. By a plan: its own (default), "
        "N%% or none",
    )


def with_kept(schemes: Sequence[Scheme], arguments: argparse.Namespace, source: Source, ui: Ui) -> tuple[Scheme, ...]:
    """The schemes, with the linears that stay in float; a note says which. By a plan they are its own, or those that
    another budget buys by what it has measured; else they are those that --keep-float leaves in float where activations
    are static."""
    if source.plan:
        from act_scales.search.budget import linears_asked

        kept = linears_asked(source.plan, source.model, arguments.keep_float)
        _note_kept(source, kept, " by the plan", ui)
        return tuple(replace(scheme, float_linears=kept) for scheme in schemes)
    asked = asked_float(arguments)
    if not any(scheme.activations.static for scheme in schemes):
        if asked not in ("auto", "none"):
            raise UserError(
                f"--keep-float {asked} without static activations",
                expected="--act per-tensor",
                do="drop --keep-float: one scale per token needs no linear in float",
            )
        return tuple(schemes)
    measured = is_measured(asked)
    if measured:
        with ui.progress("measure noise", ends=False) as progress:
            kept = source.kept(asked, progress)
    else:
        kept = source.kept(asked)
    why = ", those that one static scale costs most" if measured else ""
    _note_kept(source, kept, f"{why} (--keep-float {asked})", ui)
    return tuple(replace(scheme, float_linears=kept) if scheme.activations.static else scheme for scheme in schemes)


def note_guess(arguments: argparse.Namespace, schemes: Sequence[Scheme], source: Source, ui: Ui) -> None:
    """Say that --keep-float has guessed, where it had no mean squares to measure by."""
    asked = asked_float(arguments)
    static = any(scheme.activations.static for scheme in schemes)
    if static and source.plan is None and is_measured(asked) and not source.input_mean_square:
        ui.note(
            "which linears to leave in float was a guess: these act scales have maxima alone; smoothquant calibrate "
            "measures mean squares too"
        )


def _note_kept(source: Source, kept: Sequence[str], why: str, ui: Ui) -> None:
    """Say which linears stay in float, if any do."""
    from smoothquant.static import numbers_of

    if kept:
        numbers = numbers_of(source.model, kept)
        ui.note(
            f"{len(kept)} linears stay in float{why}: {listed(kept)}; they have {numbers / 1e6:,.1f} MB in INT8, "
            f"{numbers / numbers_of(source.model):.1%} of all linears"
        )


def asked_float(arguments: argparse.Namespace) -> str:
    """What --keep-float says; "none" for a format without it."""
    return (arguments.keep_float or "auto") if "keep_float" in arguments else "none"


def is_measured(asked: str) -> bool:
    """Whether --keep-float asks for linears by what rounding costs them."""
    return asked == "auto" or "%" in asked
