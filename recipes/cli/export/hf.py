"""smoothquant export hf."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli.export.target import ExportTarget
from recipes.cli.ui import Ui

if TYPE_CHECKING:
    from exporters.export import Source, Writer


class HuggingFace(ExportTarget):
    name = "hf"
    summary = "the smoothed float checkpoint"
    description = (
        "The same function as MODEL, with weights and activations that 8 bits can hold; loads with "
        "AutoModelForCausalLM as is. Input to any other W8A8 quantizer."
    )

    def add_options(self, command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--dtype", choices=("float16", "bfloat16", "float32"), help="of the weights (default: as in MODEL)"
        )

    def writer(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> Writer:
        import torch

        from exporters.huggingface import SmoothedWriter

        return SmoothedWriter(arguments.out, getattr(torch, arguments.dtype) if arguments.dtype else None)
