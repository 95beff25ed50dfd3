"""smoothquant export w8a8."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli.export.target import ExportTarget, add_activations, add_keep_float, with_kept
from recipes.cli.ui import Ui
from smoothquant.scheme import PER_TOKEN, scheme_of

if TYPE_CHECKING:
    from exporters.export import Source, Writer


class W8A8(ExportTarget):
    name = "w8a8"
    form = "compressed-tensors"
    summary = "the W8A8 checkpoint (compressed-tensors)"
    description = (
        "INT8 weights per output channel, INT8 activations; loads with transformers + compressed-tensors, and is the "
        "form that vLLM serves."
    )

    def add_options(self, command: argparse.ArgumentParser) -> None:
        add_activations(command)
        add_keep_float(command)

    def writer(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> Writer:
        from exporters.huggingface import W8A8Writer

        scheme = scheme_of(arguments.act) if arguments.act else PER_TOKEN
        [held] = with_kept([scheme], arguments, source, ui)
        return W8A8Writer(arguments.out, held)
