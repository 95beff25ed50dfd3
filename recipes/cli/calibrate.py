"""smoothquant calibrate: activation scales of a model on a text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli import options
from recipes.cli.ui import Ui, listed

if TYPE_CHECKING:
    from act_scales.store import ActScales
    from smoothquant.model import Model


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "calibrate",
        parents=[common],
        help="measure activation ranges on a text",
        description="Run a text through the model, one layer in memory at a time, and keep per channel the largest "
        "|input| and |output| of every linear. A few hundred sequences of the kind of text that the model will serve "
        "are enough. An interrupted run goes on near where it stopped.",
    )
    command.add_argument("model", metavar="MODEL", help="Hugging Face model folder")
    options.add_text(command, samples=128, length=512)
    command.add_argument(
        "--out", required=True, metavar="FILE", help="act scales to write, as in llama.act_scales.safetensors"
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="arithmetic (default auto: 16 bits where the checkpoint has them and the machine is quick at them)",
    )
    options.add_memory(
        command, "a matrix is read some rows at a time, whenever it is used, and hidden states lie in mapped files"
    )
    options.add_device(command)
    options.add_family(command)
    options.add_overwrite(command)
    options.share_team(command)
    command.set_defaults(run=run)


def note_what_is_folded(ui: Ui, model: Model) -> None:
    """Say what is left to smooth where no norm feeds linears alone."""
    groups = model.family.groups
    if not any(group.through == "norm" for group in groups):
        folds = " and ".join(f"{group.source} -> {', '.join(group.linears)}" for group in groups)
        ui.note(f"no norm of this model feeds linears alone: only {folds or 'nothing'} can be smoothed")


def warn_of_silence(ui: Ui, scales: ActScales, model: Model) -> None:
    """Name the linears of which calibration saw no input but zero. Shown with --quiet, too."""
    experts = model.expert_modules
    unreached = [module for module in scales.silent if module in experts]
    if unreached:
        ui.warn(
            f"no token of the calibration reached {listed(unreached, 8)}: not smoothed before their last linear, and "
            "static scales are the other experts'; calibrate on more text, or on text like what the model will serve"
        )
    zero = [name for name in scales.zero if name.rpartition(".")[0] not in experts]
    if zero:
        ui.warn(
            f"the input of {listed(zero, 8)} was zero for every token of the calibration: not smoothed there, and a "
            "static scale takes it for zero ever after; check the weights before it, or calibrate on more text"
        )


def check_memory(arguments: argparse.Namespace, memory: int | None, model: Model) -> None:
    """Raise UserError, before the text is read, if --memory is below the least."""
    from smoothquant.device import choose_device, choose_dtype
    from smoothquant.memory import for_calibration

    dtype = choose_dtype(arguments.dtype, model.checkpoint.dtype, choose_device(arguments.device))
    for_calibration(model, memory, arguments.length, dtype)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from act_scales.collect import collect
    from smoothquant import float16

    memory = options.memory(arguments)
    model = options.open_model(arguments, arguments.model, ui)
    check_memory(arguments, memory, model)
    note_what_is_folded(ui, model)
    text = options.load_text(arguments, ui, arguments.text, model, arguments.samples, arguments.length)
    begun = f", each sequence begins with {text.sequence_start}" if text.sequence_start else ""
    ui.note(f"{len(text.sequences)} sequences, {text.tokens:,} tokens from {text.source}{begun}")
    with ui.progress("calibrate") as progress:
        scales = collect(
            model,
            text,
            arguments.out,
            dtype=arguments.dtype,
            device=arguments.device,
            overwrite=arguments.overwrite,
            memory=memory,
            team=arguments.team,
            progress=progress,
        )
    warn_of_silence(ui, scales, model)
    fault = float16.beyond(model, scales.held_absmax, float16.MARGIN)
    if fault:
        ui.note(f"{fault}, which float16 may not hold: export in bfloat16 or float32")
    ui.result(
        {
            "out": arguments.out,
            "linears": len(scales.input_absmax),
            "silent": scales.silent,
            "metadata": dict(scales.metadata),
        }
    )
    ui.done(arguments.out, f"{arguments.out}: activation ranges of {len(scales.input_absmax)} linears")
