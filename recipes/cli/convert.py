"""smoothquant convert: somebody's INT8 folder, in the form of another program."""

from __future__ import annotations

import argparse

from recipes.cli import options
from recipes.cli.ui import Ui
from smoothquant.int8_config import COMPRESSED_TENSORS, MODELOPT


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "convert",
        parents=[common],
        help="turn an INT8 folder, whoever made it, into the form of another program",
        description="Turn an INT8 folder (W8A8, symmetric) from ModelOpt's form into that of compressed-tensors, which "
        "vLLM reads, or back. No INT8 number changes. A pre_quant_scale is folded into the norm or the linear before "
        "it; where that cannot be done, the linear is named and nothing is written. The model is read layer by layer; "
        "an interrupted conversion goes on where it stopped.",
    )
    command.add_argument("folder", metavar="FOLDER", help="INT8 folder: config.json, weights, tokenizer")
    command.add_argument("--to", required=True, choices=(COMPRESSED_TENSORS, MODELOPT), help="form to write")
    command.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    options.add_family(command)
    options.add_overwrite(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from exporters.huggingface.convert import convert
    from exporters.huggingface.dialects import DIALECTS
    from recipes.families import open_int8_model
    from smoothquant.outputs import load_manifest

    source = open_int8_model(
        arguments.folder,
        arguments.family,
        length=arguments.max_length,
        trust_family=arguments.trust_family,
        again=arguments.overwrite,
    )
    for line in source.checkpoint.notes:
        ui.note(line)
    with ui.progress("convert") as progress:
        convert(source, DIALECTS[arguments.to], arguments.out, overwrite=arguments.overwrite, progress=progress)
    manifest = load_manifest(arguments.out)
    ui.result({"out": arguments.out, "bytes": manifest.nbytes, "manifest": manifest.as_dict()})
    ui.done(arguments.out, f"{arguments.out}: {manifest.nbytes / 1e6:,.1f} MB, in the form of {arguments.to}")
