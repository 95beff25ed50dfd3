"""smoothquant build tensorrt."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli import options
from recipes.cli.ui import Ui

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from builders.tensorrt.kernels import BuiltProduct
    from smoothquant.artifacts.manifest import Manifest

NAME = "tensorrt"
SHOWN = 10  # products that are named one by one


def add(targets: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = targets.add_parser(
        NAME,
        parents=[common],
        help="TensorRT engine, for the NVIDIA GPU of this machine",
        description="Build a plan with TensorRT 10.1 or later, or 11: strongly typed, on the GPU that will run it, "
        "with a profile for prefill and one for decode. Every quantized product is looked up in the finished engine: a "
        "table says which became INT8 kernels. The engine is loaded and run once.",
    )
    options.add_engine(command)
    options.add_triton(command)
    command.add_argument(
        "--fp32",
        action="store_true",
        help="build it even if all that is not INT8 is float32 (smoothquant export onnx --for tensorrt makes it half "
        "precision)",
    )
    held = command.add_argument_group("what the engine must hold")
    held.add_argument("--max-batch", type=int, default=1, metavar="N", help="sequences at once (default 1)")
    held.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a sequence, prompt and continuation (default 2048, or what the model knows if that is less)",
    )
    held.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="tokens of a prompt run at once; memory for activations and logits grows with it (default 512)",
    )
    held.add_argument(
        "--usual-prompt", type=int, metavar="N", help="choose prefill kernels for this many tokens (default --chunk)"
    )
    held.add_argument(
        "--usual-context", type=int, metavar="N", help="choose decode kernels for this much cache (default half of it)"
    )
    how = command.add_argument_group("how TensorRT builds")
    how.add_argument("--workspace", type=float, metavar="GIB", help="GPU memory for kernels' scratch (default all)")
    how.add_argument("--timing-cache", metavar="FILE", help="times of kernels, read and added to: quicker builds")
    how.add_argument(
        "--optimization-level",
        type=int,
        default=3,
        metavar="0..5",
        help="0, quick build, to 5, quick engine (default 3)",
    )
    how.add_argument(
        "--hardware-compatibility",
        choices=("none", "ampere+"),
        default="none",
        help="ampere+: for every GPU from Ampere on (A100, H100), a bit slower; default none: for this GPU's kind",
    )
    how.add_argument(
        "--version-compatible", action="store_true", help="for later TensorRT releases of this generation, too"
    )
    how.add_argument("--weight-streaming", action="store_true", help="weights may stay in host memory, read as needed")
    how.add_argument(
        "--no-tf32", action="store_true", help="float32 products in float32: closer to ONNX Runtime's logits, slower"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from builders.tensorrt.build import build
    from builders.tensorrt.compiler import Options

    limits = {
        "batch": arguments.max_batch,
        "length": arguments.max_length,
        "chunk": arguments.chunk,
        "usual_prompt": arguments.usual_prompt,
        "usual_context": arguments.usual_context,
    }
    how = Options(
        workspace=arguments.workspace,
        optimization_level=arguments.optimization_level,
        hardware_compatible=arguments.hardware_compatibility == "ampere+",
        version_compatible=arguments.version_compatible,
        weight_streaming=arguments.weight_streaming,
        tf32=not arguments.no_tf32,
    )
    options.check_triton(arguments)
    with ui.progress("build tensorrt") as progress:
        manifest = build(
            arguments.export,
            arguments.out,
            limits,
            how,
            timing_cache=arguments.timing_cache,
            activations=arguments.act,
            fp32=arguments.fp32,
            overwrite=arguments.overwrite,
            progress=progress,
            warn=ui.warn,
        )
    triton = options.write_triton(arguments)
    show(ui, manifest)
    ui.result({"out": arguments.out, "manifest": manifest.as_dict(), **triton})
    options.say_next(ui, arguments, triton)
    warn_of_floats(ui, manifest, arguments.out)


def show(ui: Ui, manifest: Manifest) -> None:
    """A line per kind of linear."""
    from builders.tensorrt.record import TensorRTInputs, TensorRTResults

    kernels, built = manifest.results_as(TensorRTResults).kernels, manifest.inputs_as(TensorRTInputs).tensorrt
    kinds: dict[str, list[BuiltProduct]] = {}
    for product in kernels.products:
        kinds.setdefault(product.module.rpartition(".")[2], []).append(product)
    rows = [
        (
            kind,
            f"{sum(product.int8 for product in found)} of {len(found)}",
            ", ".join(dict.fromkeys(name for product in found for name in product.kernels)),
        )
        for kind, found in kinds.items()
    ]
    title = f"TensorRT {built.version} on {built.gpu}"
    if not rows:
        ui.say(f"{title}: a float engine, of a float export: no product is quantized")
        return
    ui.table(title, ("quantized product", "INT8", "kernels"), rows)
    ui.say(f"{kernels.int8} of {kernels.quantized} quantized products are INT8 kernels")


def warn_of_floats(ui: Ui, manifest: Manifest, out: str) -> None:
    """A line for each product that is no INT8 kernel. It is no error: TensorRT's timing may prefer a float one."""
    from builders.tensorrt.record import TensorRTResults
    from smoothquant.outputs import MANIFEST

    floats = manifest.results_as(TensorRTResults).kernels.lost
    for product in floats[:SHOWN]:
        ui.warn(f"not INT8: {product.module}: {product.why}")
    if len(floats) > SHOWN:
        ui.warn(f"not INT8: {len(floats) - SHOWN} more, in {out}/{MANIFEST}")
