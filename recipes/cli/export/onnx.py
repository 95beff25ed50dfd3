"""smoothquant export onnx."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from recipes.cli.export.target import ExportTarget, add_activations, add_keep_float, with_kept
from recipes.cli.ui import Ui
from smoothquant.capacity import FOLDED, FOR_CACHE, Capacity
from smoothquant.errors import UserError
from smoothquant.scheme import CACHES, EMBEDDINGS, HEADS, scheme_of

if TYPE_CHECKING:
    from exporters.export import Source, Writer
    from smoothquant.model import Model
    from smoothquant.plan import Plan

CACHE_FORMS = _, IN_PLACE = ("grown", "in-place")  # of --cache
BOTH = ("per-token", "per-tensor")  # forms of --act both


class Onnx(ExportTarget):
    name = "onnx"
    summary = "the W8A8 ONNX graph (Q/DQ)"
    description = (
        "A decoder with KV cache in standard operators, weights in external data. Build an engine from it: smoothquant "
        "build onnxruntime DIR --out ENGINE, build openvino or, with --for tensorrt, build tensorrt."
    )

    def add_options(self, command: argparse.ArgumentParser) -> None:
        add_activations(command, "both", help="; both: two graphs that share their weights")
        command.add_argument("--float", action="store_true", help="the unquantized graph: a reference engine")
        command.add_argument(
            "--for",
            dest="engine",
            choices=("onnxruntime", "tensorrt"),
            help="the engine that will run it. tensorrt: all that is not INT8, the head too, in the checkpoint's "
            "half type (float16 for float32), which is refused where it would overflow; onnxruntime: in float32",
        )
        command.add_argument(
            "--dtype",
            choices=("fp32", "fp16", "bf16"),
            help="of everything that is not INT8 (default that of --for, else fp32; bf16 is for TensorRT alone)",
        )
        command.add_argument(
            "--lm-head",
            choices=tuple(HEADS),
            help="quantize the output head too: quicker decode; measure the accuracy (default float)",
        )
        command.add_argument(
            "--embedding",
            choices=tuple(EMBEDDINGS),
            help="rows of the embedding: int8 has a static scale for each, and is for ONNX Runtime alone. Where the "
            "embedding is tied to a head in INT8, both read one table (default float, or the plan's)",
        )
        command.add_argument(
            "--kv",
            choices=tuple(CACHES),
            help="KV cache: int8 has a static scale for the keys and one for the values of a layer; measure the "
            "accuracy (default float)",
        )
        command.add_argument(
            "--opset",
            type=int,
            choices=(17, 21, 23),
            help="default 21, for ONNX Runtime and TensorRT 10 and 11; 17 is for TensorRT 8.6; 23 has attention as one "
            "operator, which is for ONNX Runtime, and for TensorRT from 10.14 on with a half body",
        )
        command.add_argument(
            "--cache",
            choices=CACHE_FORMS,
            default=CACHE_FORMS[0],
            help="grown: every run puts past and new keys and values together, a copy of all (default). in-place: it "
            "writes into buffers of --capacity tokens (TensorScatter, opset 24): no copy, and no shape grows with the "
            "sequence. For TensorRT from 10.15 on, with a float cache, and for ONNX Runtime on a CPU",
        )
        command.add_argument(
            "--capacity",
            type=int,
            metavar="N",
            help="of --cache in-place: the most tokens of a sequence, prompt and continuation. Attention reads a whole "
            "buffer, however many tokens it holds",
        )
        add_keep_float(command)

    def smoothing(self, arguments: argparse.Namespace, model: Model) -> Capacity:
        _body(arguments, model)
        _capacity(arguments, model)
        if arguments.engine == "tensorrt" and EMBEDDINGS[arguments.embedding or "float"].quantized:
            raise UserError(
                f"--for tensorrt with --embedding {arguments.embedding}",
                expected="a float embedding: TensorRT looks up no integers",
                do="drop one of them",
            )
        kv = arguments.kv if arguments.kv and CACHES[arguments.kv].quantized else None
        if not arguments.float:
            return FOR_CACHE if kv else FOLDED
        asked = {"--plan": arguments.plan, "--act": arguments.act, "--kv": kv, "--alpha": arguments.alpha}
        for option, value in asked.items():
            if value is not None:
                raise UserError(
                    f"--float with {option} {value}", expected="one of them: nothing is quantized by --float"
                )
        return Capacity("--float", groups=("none",))

    def source(self, arguments: argparse.Namespace, model: Model, plan: Plan | None, usual_alpha: float) -> Source:
        from recipes.pipeline import source_of

        given = super().source(arguments, model, plan, usual_alpha)
        if not arguments.float:
            return given
        plain = source_of(model, None, given.settings)  # how far it reaches is all that is read of act scales
        return replace(plain, held_absmax=given.held_absmax)

    def writer(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> Writer:
        from exporters.onnx import OnnxWriter

        forms = ("float",) if arguments.float else BOTH if arguments.act == "both" else (arguments.act or BOTH[0],)
        kv, head, embedding = (named or "float" for named in (arguments.kv, arguments.lm_head, arguments.embedding))
        schemes = [scheme_of(form, kv_cache=kv, head=head, embedding=embedding) for form in forms]
        held = with_kept(schemes, arguments, source, ui)
        capacity = _capacity(arguments, source.model)
        body = _body(arguments, source.model)
        return OnnxWriter(arguments.out, *held, body=body, opset=arguments.opset, capacity=capacity)

    def notes(self, arguments: argparse.Namespace, source: Source, ui: Ui) -> None:
        head, embedding = HEADS[arguments.lm_head or "float"], EMBEDDINGS[arguments.embedding or "float"]
        if embedding.quantized and source.model.geometry.tied_embeddings and not head.quantized:
            ui.note("the float head keeps the table that it shares with the embedding: INT8 rows are stored beside it")
        if arguments.opset == 23 and _body(arguments, source.model) == "fp32":
            ui.note(
                "opset 23 with an fp32 body is for ONNX Runtime alone: TensorRT has no attention kernel for float32"
            )


def _capacity(arguments: argparse.Namespace, model: Model) -> int | None:
    """The capacity that --cache and --capacity ask for, None for a cache that grows. Raises UserError if they
    contradict each other, the model or the engine."""
    capacity, in_place = arguments.capacity, arguments.cache == IN_PLACE
    longest = model.geometry.max_positions
    if in_place != (capacity is not None):
        raise UserError(
            f"--cache {arguments.cache} {'without --capacity' if in_place else f'with --capacity {capacity}'}",
            expected="--cache in-place with --capacity N, the most tokens of a sequence",
        )
    if capacity is None:
        return None
    if not 2 <= capacity <= longest:
        raise UserError(f"--capacity {capacity}", expected=f"2 to {longest}, the positions that the model knows")
    if arguments.engine == "tensorrt" and CACHES[arguments.kv or "float"].quantized:
        raise UserError(
            f"--for tensorrt with --cache in-place and --kv {arguments.kv}",
            expected="a float cache: TensorRT writes no integers in place",
            do="drop --kv, or leave --cache out",
        )
    return capacity


def _body(arguments: argparse.Namespace, model: Model) -> str:
    """The body that --for and --dtype ask for. Raises UserError if they contradict each other."""
    from exporters.onnx.form import body_for

    if arguments.engine is None:
        return arguments.dtype or "fp32"
    return body_for(arguments.engine, model.checkpoint.dtype, arguments.dtype)
