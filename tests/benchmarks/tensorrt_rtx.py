"""What TensorRT's compiler makes of our graphs, without a GPU: integer products, kernels, memory, time to compile.

size       a block of realistic size, and a model with more than 2 GB of INT8 weights
layer      kernels that one more decoder layer adds, by the form of the graph
attention  kernels of one attention, 32 heads of 128 channels and 8 kv heads, in basic operators and as Attention-23
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from builders.check import CheckedGraph, check
from builders.check.tensorrt_rtx import Compilation, compile_apart
from builders.nvidia.profiles import single_profile
from builders.onnx_graph import OnnxGraph
from exporters.export import Source, export
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.results import Row, publish
from tests.builders.check.lint.graphs import graph, saved
from tests.writers import onnx_writer

BATCH, TOKENS, BEHIND = 4, 512, 1536
PROFILE = single_profile(BATCH, TOKENS, BEHIND)
BLOCK = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8}
FORMS: dict[str, dict] = {  # opset 21, unless it says another
    "per token, FP32 body": {"activations": "per-token"},
    "per token, FP16 body": {"activations": "per-token", "body": "fp16"},
    "per token, FP16 body, opset 17": {"activations": "per-token", "body": "fp16", "opset": 17},
    "per token, FP16 body, opset 23": {"activations": "per-token", "body": "fp16", "opset": 23},
    "per tensor, FP32 body": {"activations": "per-tensor"},
    "per tensor, FP16 body": {"activations": "per-tensor", "body": "fp16"},
    "float, FP16 body": {"activations": "float", "body": "fp16"},
}
KERNELS = ("kgen", "gemm", "runtime_fusion")
HEADS = "[batch, {0}, {1}, 128]"
BASIC = """r = Reshape(q, rows)  h = Mul(r, half)  t = Transpose <perm = [0, 1, 3, 2]> (k)  c = MatMul(h, t)
    g = Concat <axis = 2> (mask, mask, mask, mask)  a = Where(g, c, low_half)
    p = Softmax <axis = -1> (a)  o = MatMul(p, v)  y = Reshape(o, heads)"""
ATTENTIONS = {
    "basic operators, grouped rows": (21, BASIC),
    "Attention-23, float mask": (23, "f = Where(mask, zero_half, low_half)  y = Attention(q, k, v, f)"),
    "Attention-23, bool mask": (23, "y = Attention(q, k, v, mask)"),
}


def main() -> None:
    details: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        rows = [*sizes(root, details), *layers(root, details), *attentions(root, details)]
    publish("tensorrt_rtx", rows, details)


def sizes(root: Path, details: dict) -> Iterator[Row]:
    for name, count, vocabulary in (("a block of hidden size 4096", 1, 512), ("10 such blocks", 10, 32000)):
        save_random_llama(root / "model", layers=count, vocabulary=vocabulary, **BLOCK)
        begin = time.perf_counter()
        found, seconds = made(root, FORMS["per token, FP16 body"])
        exported = time.perf_counter() - begin - seconds
        compilation = whole(found)
        yield Row(
            f"TensorRT-RTX {compilation.version} compiles {name}",
            f"{compilation.weight_bytes / 1e9:.2f} GB of weights in {compilation.seconds:.1f} s and "
            f"{compilation.peak_bytes / 1e9:.1f} GB of memory; {integers(found)}",
            "all INT8",
        )
        details[name] = summary(found) | {"export_seconds": exported}


def layers(root: Path, details: dict) -> Iterator[Row]:
    """Heads as in a real model, other sizes small: fusion goes by the graph."""
    small = {"hidden": 1024, "intermediate": 2048, "heads": 8, "kv_heads": 2, "vocabulary": 512}
    for form, options in FORMS.items():
        counts: list[int] = []
        for count in (1, 2):
            save_random_llama(root / "model", layers=count, **small)
            found, _ = made(root, options)
            counts.append(kernels(whole(found)))
            details[f"{form}, {count} layers"] = summary(found)
        yield Row(f"kernels of a decoder layer, {form}", str(counts[1] - counts[0]))


def attentions(root: Path, details: dict) -> Iterator[Row]:
    k = f"float16{HEADS.format(8, 'total')}"
    inputs = f"float16{HEADS.format(32, 'tokens')} q, {k} k, {k} v, bool[batch, 1, tokens, total] mask"
    for name, (opset, body) in ATTENTIONS.items():
        path = saved(graph(body, inputs, f"float16{HEADS.format(32, 'tokens')} y", opset), root)
        compilation = compile_apart(path, PROFILE, OnnxGraph(path).symbols)
        assert not compilation.errors, compilation.errors
        memory = f"{compilation.activation_bytes / 1e6:.0f} MB at {BATCH} x {TOKENS} tokens"
        yield Row(f"attention in FP16, {name}", f"{kernels(compilation)} kernels, {memory} behind {BEHIND}")
        details[name] = {"kernels": kernels(compilation), "activation_bytes": compilation.activation_bytes}


def made(root: Path, options: dict) -> tuple[CheckedGraph, float]:
    """Export the model in `root` in this form, and compile it. Returns the check, and its seconds."""
    model = open_model(root / "model")
    absmax = {name: torch.rand(shape[1]) + 0.5 for name, shape in model.linears()}
    out = Path(tempfile.mkdtemp(dir=root)) / "onnx"
    export(Source(model, SmoothingSettings(groups="none"), absmax), [onnx_writer(out, **options)])
    begin = time.perf_counter()
    found = check(out, compile=lambda g: compile_apart(g.path, PROFILE, g.symbols))
    seconds = time.perf_counter() - begin
    for file in out.iterdir():
        file.unlink()
    return found, seconds


def whole(found: CheckedGraph) -> Compilation:
    assert found.compilation is not None
    assert not found.compilation.errors, found.compilation.errors
    return found.compilation


def kernels(compilation: Compilation) -> int:
    return sum(layer.kind in KERNELS for layer in compilation.layers)


def integers(found: CheckedGraph) -> str:
    return f"{sum(verdict.int8 for verdict in found.verdicts)} of {len(found.verdicts)} products INT8"


def summary(found: CheckedGraph) -> dict:
    compilation = whole(found)
    sizes = ("plan_bytes", "weight_bytes", "activation_bytes", "peak_bytes", "seconds", "version")
    return {
        "products": len(found.verdicts),
        "int8": sum(verdict.int8 for verdict in found.verdicts),
        "layers": dict(found.kinds),
        **{name: getattr(compilation, name) for name in sizes},
    }


if __name__ == "__main__":
    main()
