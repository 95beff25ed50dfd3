"""The options of `smoothquant export onnx`, and the writer that they come to."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli.ui import Ui
from smoothquant.errors import UserError

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from exporters.export import Writer

SUMMARY = "the W8A8 ONNX graph (Q/DQ)"
DESCRIPTION = (
    "A decoder with KV cache in standard operators, weights in external data. Build an engine from it: smoothquant "
    "build onnxruntime DIR --out ENGINE, or build tensorrt."
)


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--act",
        choices=("per-token", "per-tensor", "both"),
        help="activations: one dynamic scale per token (accurate, default) or one static scale per tensor; both: two "
        "graphs that share their weights",
    )
    command.add_argument("--float", action="store_true", help="the unquantized graph: a reference engine")
    command.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="of everything that is not INT8 (default fp32; bf16 is for TensorRT alone)",
    )
    command.add_argument(
        "--lm-head",
        choices=("float", "int8"),
        default="float",
        help="quantize the output head too: quicker decode; measure the accuracy (default float)",
    )
    command.add_argument(
        "--kv",
        choices=("float", "int8"),
        default="float",
        help="KV cache: int8 has a static scale for the keys and one for the values of a layer; measure the accuracy "
        "(default float)",
    )
    command.add_argument(
        "--opset",
        type=int,
        choices=(17, 21, 23),
        default=21,
        help="default 21, for ONNX Runtime and TensorRT 10 and 11; 17 is for TensorRT 8.6; 23 has attention as one "
        "operator, which is for ONNX Runtime, and for TensorRT from 10.14 on with a half body",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that contradict each other."""
    quantizing = {"--act": arguments.act, "--kv": None if arguments.kv == "float" else arguments.kv}
    for option, value in quantizing.items():
        if arguments.float and value:
            raise UserError(f"--float with {option} {value}", expected="one of them: nothing is quantized by --float")


def notes(arguments: argparse.Namespace, ui: Ui) -> None:
    """Say what the graph is not for."""
    if arguments.opset == 23 and arguments.dtype == "fp32":
        ui.note("opset 23 with an fp32 body is for ONNX Runtime alone: TensorRT has no attention kernel for float32")


def writer(arguments: argparse.Namespace, kept: tuple[str, ...]) -> Writer:
    from exporters.onnx import OnnxWriter

    return OnnxWriter(
        arguments.out,
        "float" if arguments.float else arguments.act or "per-token",
        body=arguments.dtype,
        lm_head=arguments.lm_head,
        kept=kept,
        opset=arguments.opset,
        kv=arguments.kv,
    )
