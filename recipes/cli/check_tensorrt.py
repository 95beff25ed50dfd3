"""`smoothquant check` of a TensorRT engine: what became of every quantized product, and its outputs beside ONNX
Runtime's."""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.cli import build_tensorrt
from recipes.cli.ui import Ui
from smoothquant.errors import CheckError


def check_tensorrt(arguments: argparse.Namespace, ui: Ui) -> None:
    """Raises CheckError if a quantized product is no INT8 kernel. Only `--against` needs TensorRT and a GPU."""
    from builders.nvidia.layers import read_layers
    from builders.tensorrt.build import LAYERS
    from builders.tensorrt.record import TensorRTResults
    from smoothquant.artifacts.record import as_json
    from smoothquant.outputs import load_manifest
    from smoothquant.reading import read_text

    path = Path(arguments.path)
    manifest = load_manifest(path)
    build_tensorrt.show(ui, manifest)
    if arguments.layers:
        for layer in read_layers(read_text(path / LAYERS)):
            ui.say(f"{layer.kind:<14} {', '.join(layer.inputs)}  {layer.name}")
    compared = _compare(path, Path(arguments.against), ui) if arguments.against else []
    kernels = manifest.results_as(TensorRTResults).kernels
    lost = kernels.lost
    ui.result({"passed": not lost, "path": str(path), "kernels": as_json(kernels), "outputs": compared})
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise CheckError(f"{path}: {lost[0].module} is not INT8: {lost[0].why}{more}")


def _compare(engine: Path, graph: Path, ui: Ui) -> list[dict]:
    from builders.tensorrt.compare import compare
    from builders.tensorrt.engine import TensorRTEngine

    found = compare(graph, TensorRTEngine(engine))
    rows = [
        (one.run, one.output, f"{one.absolute:.2e}", f"{one.relative:.2e}", f"{one.typical:.2e}")
        for one in found
        if one.output == "logits" or one.absolute == max(other.absolute for other in found if other.run == one.run)
    ]
    ui.table(
        f"{engine} beside ONNX Runtime on {graph}",
        ("run", "output", "largest difference", "relative", "median"),
        rows,
        caption="the logits, and the output that differs most; all with --json",
    )
    return [one.as_dict() for one in found]
