"""smoothquant export onnx."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli.export.target import ExportTarget, add_activations, add_keep_float, kept_linears
from recipes.cli.ui import Ui
from smoothquant.capacity import FOLDED, Capacity
from smoothquant.errors import UserError

if TYPE_CHECKING:
    from exporters.export import Source, Writer
    from smoothquant.model import Model


class Onnx(ExportTarget):
    name = "onnx"
    summary = "the W8A8 ONNX graph (Q/DQ)"
    description = (
        "A decoder with KV cache in standard operators, weights in external data. Build an engine from it: smoothquant "
        "build onnxruntime DIR --out ENGINE, or build tensorrt."
    )

    def add_options(self, command: argparse.ArgumentParser) -> None:
        add_activations(command, "both", help="; both: two graphs that share their weights")
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
            help="KV cache: int8 has a static scale for the keys and one for the values of a layer; measure the "
            "accuracy (default float)",
        )
        command.add_argument(
            "--opset",
            type=int,
            choices=(17, 21, 23),
            default=21,
            help="default 21, for ONNX Runtime and TensorRT 10 and 11; 17 is for TensorRT 8.6; 23 has attention as one "
            "operator, which is for ONNX Runtime, and for TensorRT from 10.14 on with a half body",
        )
        add_keep_float(command)

    def smoothing(self, arguments: argparse.Namespace, model: Model) -> Capacity:
        if not arguments.float:
            return FOLDED
        asked = {"--act": arguments.act, "--kv": arguments.kv, "--alpha": arguments.alpha}
        for option, value in asked.items():
            if value not in (None, "float"):
                raise UserError(
                    f"--float with {option} {value}", expected="one of them: nothing is quantized by --float"
                )
        return Capacity("--float", groups=("none",))

    def source(self, arguments: argparse.Namespace, model: Model) -> Source:
        unread = {"act_scales": None} if arguments.float else {}  # nothing is computed from them
        return super().source(argparse.Namespace(**{**vars(arguments), **unread}), model)

    def writer(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> Writer:
        from exporters.onnx import OnnxWriter

        return OnnxWriter(
            arguments.out,
            "float" if arguments.float else arguments.act or "per-token",
            body=arguments.dtype,
            lm_head=arguments.lm_head,
            kept=kept_linears(arguments, source, ui),
            opset=arguments.opset,
            kv=arguments.kv,
        )

    def notes(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> None:
        if arguments.opset == 23 and arguments.dtype == "fp32":
            ui.note(
                "opset 23 with an fp32 body is for ONNX Runtime alone: TensorRT has no attention kernel for float32"
            )
