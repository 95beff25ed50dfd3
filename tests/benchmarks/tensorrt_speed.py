"""INT8 against FP16 in TensorRT, on a random Llama: prefill of a prompt, and one token behind it. Needs a GPU.

    python -m tests.benchmarks.tensorrt_speed [--hidden 4096 --layers 4 --vocab 32000 --prefill 512 --repeats 7]

The model is made on the spot and exported three times with a float16 body: the float twin, W8A8 per token with the
float output head, W8A8 with the INT8 one. Each becomes an engine; all are open at once and take turns; what counts are
ratios of times next to each other, their median over the repeats. The time of a step includes what our engine does in
Python around it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from builders.engine.speed import measure
from builders.tensorrt import hardware
from builders.tensorrt.build import build
from builders.tensorrt.engine import TensorRTEngine
from exporters.export import Source, export
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from smoothquant.errors import UserError
from smoothquant.settings import SmoothingSettings
from tests.benchmarks import gpu
from tests.benchmarks.gpu import PHASES, QUICK
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
    with tempfile.TemporaryDirectory() as scratch:
        engines, kernels = build_all(Path(scratch), arguments)
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


def build_all(scratch: Path, arguments: argparse.Namespace) -> tuple[dict, dict]:
    """Engines by label, and what their manifests say of their kernels."""
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
    return engines, kernels


if __name__ == "__main__":
    main()
