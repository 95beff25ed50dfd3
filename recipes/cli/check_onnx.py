"""`smoothquant check` of an ONNX graph: findings of the linter, then what a compiler makes of it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.cli.ui import Ui, listed
from smoothquant.errors import CheckError, UserError

if TYPE_CHECKING:  # onnx and torch are imported when the command runs, not for --help
    from builders.check import CheckedGraph, Compile
    from builders.check.tensorrt_rtx import Compilation
    from builders.onnx_graph import OnnxGraph

COMPILED_FOR = {  # option -> default, what it is
    "--max-batch": (4, "so many sequences"),
    "--chunk": (256, "so many tokens in a run"),
    "--max-length": (2048, "so many tokens in a sequence"),
}
KINDS = {
    "kgen": "generated kernels (norms, activations, softmax, quantization)",
    "runtime_fusion": "floating-point products, fused with what is around them",
    "Int8 gemm": "INT8 matrix products",
    "Half gemm": "FP16 matrix products",
    "BFloat16 gemm": "BF16 matrix products",
    "Float gemm": "FP32 matrix products",
}


def check_onnx(arguments: argparse.Namespace, ui: Ui) -> None:
    """Raises CheckError if TensorRT would refuse the graph, or run a quantized product in floating point."""
    from builders.check import check
    from builders.check.lint import NEWEST

    tensorrt = _version(arguments.tensorrt) if arguments.tensorrt else NEWEST
    compile_ = _compile(arguments, ui) if arguments.compiler else None
    checks = []
    for path in _graphs(Path(arguments.path)):
        checks.append(check(path, tensorrt, compile_))
        _show(checks[-1], ui, arguments.layers)
    faults = [f"{found.path}: {fault}" for found in checks for fault in found.faults]
    ui.result({"passed": not faults, "graphs": [found.as_dict() for found in checks]})
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckError(f"{faults[0]}{more}")


def _graphs(path: Path) -> list[Path]:
    """The ONNX files of a folder of ours, which may be two; any other path itself."""
    from smoothquant.outputs import is_output, load_manifest

    if not is_output(path):
        return [path]
    return [path / name for name in load_manifest(path).files if name.endswith(".onnx")]


def show_rules(ui: Ui) -> None:
    """All rules of the linter."""
    from builders.check.lint import RULES

    for rule in RULES:
        ui.say(f"{rule.id}: {rule.demands}")
        ui.say(f"    else {rule.effect.value}: {rule.because}")
    said = ("id", "demands", "because")
    rules = [{name: getattr(rule, name) for name in said} | {"effect": rule.effect.name.lower()} for rule in RULES]
    ui.result({"rules": rules})


def _compile(arguments: argparse.Namespace, ui: Ui) -> Compile:
    from builders.check.tensorrt_rtx import compile_apart
    from builders.nvidia.profiles import single_profile

    sizes = []
    for option, (default, _) in COMPILED_FOR.items():
        given = getattr(arguments, attribute(option))
        sizes.append(default if given is None else given)
        if sizes[-1] < 1:
            raise UserError(f"{option} {given}", expected="1 or more")
    batch, chunk, length = sizes
    if length <= chunk:
        raise UserError(f"--max-length {length}", expected=f"more than the --chunk, {chunk}")
    profile = single_profile(batch, chunk, length - chunk)

    def compile_(graph: OnnxGraph) -> Compilation:
        ui.note(f"compiling {graph.path} for {batch} x {chunk} tokens behind {length - chunk}")
        return compile_apart(graph.path, profile, graph.symbols)

    return compile_


def attribute(option: str) -> str:
    """Where argparse puts an option."""
    return option.removeprefix("--").replace("-", "_")


def _version(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:\.\d+)*", text)
    if not found or int(found[1]) < 8:
        raise UserError(f"--tensorrt {text}", expected="a version from 8 on, such as 10.3")
    return int(found[1]), int(found[2] or 0)


def _show(found: CheckedGraph, ui: Ui, layers: bool) -> None:
    for finding in found.findings:
        ui.say(f"{'error' if finding.effect.is_error else 'warning'} ({finding.rule}): {finding}")
        ui.say(f"    {finding.effect.value}: {finding.because}")
    if not found.findings:
        ui.say(f"{found.path}: {len(found.products)} quantized products; nothing to find fault with")
    if found.in_float:
        ui.say(f"in floating point: {listed(found.in_float)}")
    made = found.compilation
    if not made:
        return
    for error in made.errors:
        ui.say(f"TensorRT-RTX {made.version} refuses the graph: {error}")
    if made.errors:
        return
    if layers:
        for layer in made.layers:
            ui.say(f"{layer.what:<14} {', '.join(layer.inputs)} -> {', '.join(layer.outputs)}  {layer.name}")
    kinds = [(KINDS.get(kind, kind), str(count)) for kind, count in found.kinds.most_common()]
    ui.table(f"The engine: {len(made.layers)} layers", ("", "layers"), kinds)
    for verdict in found.lost:
        ui.say(f"not INT8: {verdict.module}: {verdict.why}")
    int8 = len(found.verdicts) - len(found.lost)
    ui.say(f"{int8} of {len(found.verdicts)} quantized products are INT8 matrix products")
    ui.say(
        f"TensorRT-RTX {made.version}: plan {made.plan_bytes / 1e6:,.1f} MB, weights {made.weight_bytes / 1e6:,.1f} MB,"
        f" activations {made.activation_bytes / 1e6:,.1f} MB; compiled in {made.seconds:.1f} s, "
        f"{made.peak_bytes / 1e6:,.0f} MB of memory"
    )
