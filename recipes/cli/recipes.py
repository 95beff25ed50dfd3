"""smoothquant recipes: the models whose settings are known."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from recipes.cli.ui import Ui

CAPTION = (
    "FP16 and W8A8 are the WikiText-2 perplexities that the SmoothQuant authors published. Measure them yourself by\n"
    "smoothquant reproduce RECIPE --model MODEL --scales ACT_SCALES --out DIR"
)


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "recipes",
        parents=[common],
        help="the models whose settings are known",
        description="List the recipes for `smoothquant run`: model, alpha, and the WikiText-2 perplexities that the "
        "SmoothQuant authors published (not measured here).",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from recipes.models import RECIPES

    rows, content = [], []
    for recipe in RECIPES:
        published = recipe.published
        perplexities = (f"{published.fp16:.3f}", f"{published.w8a8:.3f}") if published else ("", "")
        rows.append(
            (
                recipe.name,
                recipe.model or f"any {recipe.family.name}",
                f"{recipe.alpha}",
                recipe.alpha_from,
                *perplexities,
            )
        )
        content.append(
            {
                "name": recipe.name,
                "family": recipe.family.name,
                "model": recipe.model,
                "alpha": recipe.alpha,
                "alpha_from": recipe.alpha_from,
                "thresholds": asdict(recipe.thresholds),
                "published_wikitext2_perplexity": asdict(published) if published else None,
            }
        )
    header = ("recipe", "model", "alpha", "by", "FP16", "W8A8")
    ui.table("Recipes", header, rows, CAPTION)
    ui.result({"recipes": content})
