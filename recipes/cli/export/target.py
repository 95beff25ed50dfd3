"""What every target of `smoothquant export` is: a name, options, and what they come to."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from recipes.cli.ui import Ui, listed
from smoothquant.capacity import FOLDED, Capacity
from smoothquant.errors import UserError
from smoothquant.scheme import ACTIVATIONS, Scheme, quantized_names

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from exporters.export import Source, Writer
    from smoothquant.model import Model


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

    def source(self, arguments: argparse.Namespace, model: Model, usual_alpha: float) -> Source:
        """The model with its act scales and smoothing settings. usual_alpha: the alpha if none is given. Raises
        UserError for settings that the format or the model cannot hold."""
        from recipes.pipeline import source_of

        alpha = usual_alpha if arguments.alpha is None else arguments.alpha
        settings = self.smoothing(arguments, model).settings(model, alpha, arguments.groups)
        return source_of(model, arguments.act_scales, settings)

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
        default="auto",
        help="with static scales: linears to leave in float. auto (default): those whose rounding puts more than a "
        "thousandth of noise on the residual stream, by the act scales and the weights; N%%, as in 5%%: those that win "
        "most per byte, up to N%% of the bytes of all linears in INT8 (each costs its INT8 bytes once more in float16, "
        "three times more in float32); none; or roles, as in o,down",
    )


def with_kept(schemes: Sequence[Scheme], arguments: argparse.Namespace, source: Source, ui: Ui) -> tuple[Scheme, ...]:
    """The schemes. Those of static activations get the linears that --keep-float leaves in float; a note says which."""
    from smoothquant.static import numbers_of

    asked = arguments.keep_float
    if not any(scheme.activations.static for scheme in schemes):
        if asked not in ("auto", "none"):
            raise UserError(
                f"--keep-float {asked} without static activations",
                expected="--act per-tensor",
                do="drop --keep-float: one scale per token needs no linear in float",
            )
        return tuple(schemes)
    measured = _is_measured(asked)
    if measured:
        with ui.progress("measure noise", ends=False) as progress:
            kept = source.kept(asked, progress)
    else:
        kept = source.kept(asked)
    if kept:
        numbers = numbers_of(source.model, kept)
        share = numbers / numbers_of(source.model)
        why = ", those that one static scale costs most" if measured else ""
        ui.note(
            f"{len(kept)} linears stay in float{why} (--keep-float {asked}): {listed(kept)}; they have "
            f"{numbers / 1e6:,.1f} MB in INT8, {share:.1%} of all linears"
        )
    return tuple(replace(scheme, float_linears=kept) if scheme.activations.static else scheme for scheme in schemes)


def note_guess(arguments: argparse.Namespace, schemes: Sequence[Scheme], source: Source, ui: Ui) -> None:
    """Say that --keep-float has guessed, where it had no mean squares to measure by."""
    asked = getattr(arguments, "keep_float", "none")
    static = any(scheme.activations.static for scheme in schemes)
    if static and _is_measured(asked) and not source.input_mean_square:
        ui.note(
            "which linears to leave in float was a guess: these act scales have maxima alone; smoothquant calibrate "
            "measures mean squares too"
        )


def _is_measured(asked: str) -> bool:
    """Whether --keep-float asks for linears by what rounding costs them."""
    return asked == "auto" or "%" in asked
