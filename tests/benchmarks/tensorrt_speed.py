"""INT8 against FP16 in TensorRT, on a random Llama: prefill of a prompt, and one token behind it. Needs a GPU.

    python -m tests.benchmarks.tensorrt_speed [--hidden 4096 --layers 4 --vocab 32000 --prefill 512 --repeats 7]

The model is made on the spot and exported three times with a float16 body: the float twin, W8A8 per token with the
float output head, W8A8 with the INT8 one. Each becomes an engine; all are open at once and take turns; what counts are
ratios of times next to each other, their median over the repeats. The time of a step includes what our engine does in
Python around it.

Every quantized product must be an INT8 kernel in the profile of a prompt (exit status 1). At one token, a float kernel
may be quicker: those are counted, not judged.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from builders.check.lint import quantized_products
from builders.engine.speed import measure
from builders.nvidia.layers import read_layers
from builders.onnx_graph import OnnxGraph
from builders.tensorrt import hardware
from builders.tensorrt.build import LAYERS, build
from builders.tensorrt.engine import TensorRTEngine
from builders.tensorrt.kernels import built_products
from builders.tensorrt.limits import DECODE, PREFILL
from exporters.export import Source, export
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from smoothquant.errors import UserError
from smoothquant.settings import SmoothingSettings
from tests.benchmarks import gpu
from tests.benchmarks.gpu import PHASES, QUICK
from tests.gpu.outcomes import FAILED, NOTE, OK, record
from tests.writers import onnx_writer

BASE = "FP16"
OPTIONS = ({"activations": "per-token"}, {"activations": "per-token", "lm_head": "int8"})
VARIANTS: dict[str, dict[str, str]] = {BASE: {"activations": "float"}, **dict(zip(QUICK, OPTIONS, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    try:
        hardware.require_tensorrt()
        device = hardware.find_gpu()
    except UserError as error:
        sys.exit(f"not measured: {error}")
    whole = True
    with tempfile.TemporaryDirectory() as scratch:
        exports, engines, kernels = build_all(Path(scratch), arguments)
        for label in QUICK:
            whole &= judge(label, exports[label], engines[label].folder)
        seconds, ratios = defaultdict(list), defaultdict(list)
        for _ in range(arguments.repeats):
            speeds = measure(engines, prompt=arguments.prefill, steps=16, rounds=3)
            for label, speed in speeds.items():
                for phase in PHASES:
                    seconds[label, phase].append(getattr(speed, phase))
                    ratios[label, phase].append(getattr(speeds[BASE], phase) / getattr(speed, phase))
    measured = {}
    for label, phase in ratios:
        took, against = (f"{median(seconds[name, phase]) * 1e3:.2f} ms" for name in (label, BASE))
        counts, found = "{int8} of {quantized} products INT8".format(**kernels[label]), ratios[label, phase]
        if label != BASE:
            spread = f"{median(found):.2f}x ({min(found):.2f} to {max(found):.2f})"
            measured[gpu.speed(phase, label)] = f"{spread}, {took} against {against}; {counts}"
            print(f"{gpu.speed(phase, label)}: {measured[gpu.speed(phase, label)]}")
    gpu.note("sm{}{}".format(*device.capability), device.name, measured)
    sys.exit(0 if whole else 1)


def judge(label: str, export: Path, engine: Path) -> bool:
    """Tell which products are INT8 kernels in each profile. Returns whether all are at a prompt."""
    nodes = [product.name for product in quantized_products(OnnxGraph(export))]
    layers, whole = read_layers((engine / LAYERS).read_text(encoding="utf-8")), True
    for profile, phase in ((PREFILL, "prefill"), (DECODE, "decode")):
        found = built_products([layer for layer in layers if layer.profile == profile], nodes)
        missed = [product for product in found if not product.int8]
        verdict = OK if not missed else NOTE if profile == DECODE else FAILED
        detail = f"{len(found) - len(missed)} of {len(found)}"
        detail += "".join(f"; {product.module}: {product.why}" for product in missed[:1])
        record(f"INT8 kernels at {phase}, {label}", verdict, detail)
        print(f"INT8 kernels at {phase}, {label}: {detail}")
        whole &= verdict != FAILED
    return whole


def build_all(scratch: Path, arguments: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Exports and engines by label, and what the engines' manifests say of their kernels."""
    heads = arguments.hidden // 128
    save_random_llama(
        scratch / "model",
        hidden=arguments.hidden,
        intermediate=arguments.hidden * 11 // 4,
        layers=arguments.layers,
        heads=heads,
        kv_heads=max(1, heads // 4),
        vocabulary=arguments.vocab,
    )
    source = Source(open_model(scratch / "model"), SmoothingSettings(groups="none"))
    folders = {label: scratch / f"export-{number}" for number, label in enumerate(VARIANTS)}
    export(source, [onnx_writer(folders[label], body="fp16", **options) for label, options in VARIANTS.items()])
    limits = {"length": arguments.prefill + 64, "chunk": arguments.prefill, "usual_context": arguments.prefill}
    engines, kernels = {}, {}
    for label, folder in folders.items():
        out = folder.with_name(folder.name.replace("export", "engine"))
        manifest = build(folder, out, limits, timing_cache=scratch / "timing.cache")
        engines[label], kernels[label] = TensorRTEngine(out), manifest.results["kernels"]
    return folders, engines, kernels


if __name__ == "__main__":
    main()
