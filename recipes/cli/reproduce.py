"""smoothquant reproduce: the published perplexities of a recipe, measured again on its weights."""

from __future__ import annotations

import argparse

from recipes.cli import options
from recipes.cli.ui import Ui


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "reproduce",
        parents=[common],
        help="the published perplexities of a recipe, measured again",
        description="WikiText-2 perplexity at 2048 tokens of a model in float and in W8A8 (norm -> linears smoothed, "
        "weights per channel, activations per token), layer by layer in PyTorch, beside what the SmoothQuant authors "
        "published. An interrupted run goes on near where it stopped.",
    )
    command.add_argument("recipe", metavar="RECIPE", help="as llama-2-7b (smoothquant recipes)")
    command.add_argument("--model", required=True, metavar="MODEL", help="folder with the recipe's weights")
    command.add_argument(
        "--scales",
        required=True,
        metavar="ACT_SCALES",
        help="from smoothquant calibrate, or the published ones: smoothquant scales pull RECIPE",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the result and for resuming")
    command.add_argument(
        "--text",
        metavar="TEXT",
        help=f"{options.TEXT_HELP} (default: WikiText-2's test split from the Hugging Face Hub)",
    )
    options.add_text_field(command)
    command.add_argument("--samples", type=int, metavar="N", help="only the first N sequences (default: all)")
    command.add_argument("--length", type=int, default=2048, help="tokens in a sequence (default 2048, as published)")
    options.add_device(command)
    options.add_family(command)
    options.add_overwrite(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from recipes.reproduce import DIFFERENCES, WIKITEXT2, reproduce, whole_blocks

    model = options.open_model(arguments, arguments.model, ui)
    recipe = options.find_recipe(arguments.recipe, model, ui)
    samples = 1 << 30 if arguments.samples is None else arguments.samples
    text = whole_blocks(arguments.text or WIKITEXT2, model, samples, arguments.length, arguments.text_field)
    ui.note(f"{len(text.sequences)} x {text.length} tokens from {text.source}, alpha {recipe.alpha}")
    with ui.progress("reproduce") as progress:
        found = reproduce(
            recipe,
            model,
            arguments.scales,
            text,
            arguments.out,
            device=arguments.device,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    published, measured = recipe.published, found.measured
    rows = [_row("published", published.fp16, published.w8a8)] if published else []
    rows.append(_row("measured here", measured.plain, measured.w8a8))
    ui.table(f"{recipe.name}: perplexity of {text.source}", ("", "float", "W8A8", ""), rows, DIFFERENCES)
    ui.result(found.as_dict())


def _row(name: str, plain: float, quantized: float) -> tuple[str, ...]:
    return name, f"{plain:.3f}", f"{quantized:.3f}", f"{quantized / plain - 1:+.2%}"
