"""smoothquant export modelopt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.cli.export.target import ExportTarget, add_keep_float, asked_float, is_measured, with_kept
from recipes.cli.ui import Ui
from smoothquant.reading import read_json
from smoothquant.scheme import PER_TENSOR

if TYPE_CHECKING:
    from exporters.export import Source, Writer


class ModelOpt(ExportTarget):
    name = "modelopt"
    form = "modelopt"
    summary = "the W8A8 checkpoint in ModelOpt's form (TensorRT Edge-LLM)"
    description = (
        "INT8 weights per output channel, one static scale for the input of each linear, everything else in float16; "
        "the form that tensorrt-edgellm-export reads (W8A8_SQ_PER_CHANNEL)."
    )

    def add_options(self, command: argparse.ArgumentParser) -> None:
        add_keep_float(command)

    def measures(self, arguments: argparse.Namespace) -> bool:
        return is_measured(asked_float(arguments))

    def notes(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> None:
        out = Path(arguments.out)
        in_settings = read_json(out / "tokenizer_config.json").get("chat_template")
        if not in_settings and not any((out / f"chat_template.{end}").exists() for end in ("jinja", "json")):
            ui.note("tensorrt-edgellm-export ends with an error where a tokenizer has no chat template, as here")

    def writer(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> Writer:
        from exporters.huggingface import ModelOptWriter

        [held] = with_kept([PER_TENSOR], arguments, source, ui)
        return ModelOptWriter(arguments.out, held)
