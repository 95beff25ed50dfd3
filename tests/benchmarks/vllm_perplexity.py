"""A W8A8 folder in vLLM, on the CPU: the perplexity of a text beside that of our own W8A8 arithmetic in bfloat16.

python -m tests.servers vllm -- --collect-only      # once: makes vLLM's environment
python -m tests.benchmarks.vllm_perplexity MODEL --calibration valid.txt --text test.txt --alpha 0.6
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from act_scales.collect import collect
from act_scales.text import load_text
from exporters.export import export
from exporters.huggingface import W8A8Writer
from recipes.families import open_model
from recipes.pipeline import source_of
from smoothquant.layers import W8A8Layer, float_layer
from smoothquant.model import Model
from smoothquant.scheme import PER_TOKEN, scheme_of
from smoothquant.settings import SmoothingSettings
from smoothquant.static import linears_to_keep
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.benchmarks.results import Row, publish
from tests.families.case import run
from tests.servers.environments import VLLM
from tests.servers.in_vllm import in_vllm

LIMIT = 0.003  # of our own arithmetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--alpha", type=float, default=0.6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--act", choices=("per-token", "per-tensor"), default="per-token")
    given = parser.parse_args()
    if VLLM.python is None:
        sys.exit("python -m tests.servers vllm makes vLLM's environment")
    model = open_model(given.model)
    text = load_text(given.text, given.model, given.samples, given.length)
    settings, scheme = SmoothingSettings(given.alpha), scheme_of(given.act)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        calibration = load_text(given.calibration, given.model, 32, 512)
        scales = collect(model, calibration, root / "act_scales.safetensors")
        source = source_of(model, root / "act_scales.safetensors", settings)
        if scheme.activations.static:
            kept = linears_to_keep("none", model, source.input_absmax, settings)
            assert kept == ()
        export(source, [W8A8Writer(root / "w8a8", scheme)])
        answers = in_vllm([Path(given.model), root / "w8a8"], [ids.tolist() for ids in text.sequences])
        served = [perplexity([torch.tensor(one) for one in answer["log_probabilities"]]) for answer in answers]
        ids = torch.stack(list(text.sequences))
        bfloat16 = torch.bfloat16
        found = {
            "the model, our decoder in float32": perplexity(ours(model, None, ids, torch.float32)),
            "the model, our decoder in bfloat16": perplexity(ours(model, None, ids, bfloat16)),
            "the model, vLLM in bfloat16": served[0],
        }
        quantized = [
            Rounded(**vars(quantize_layer(layer, PER_TOKEN).runnable(scheme.activations)))
            for layer in smoothed_layers(model, scales.input_absmax, settings)
        ]
        found |= {
            "W8A8, our arithmetic in float32": perplexity(ours(model, quantized, ids, torch.float32)),
            "W8A8, our arithmetic in bfloat16": perplexity(ours(model, quantized, ids, bfloat16)),
            "W8A8, vLLM in bfloat16": served[1],
        }
    ratio = found["W8A8, vLLM in bfloat16"] / found["W8A8, our arithmetic in bfloat16"]
    rows = [Row(what, f"perplexity {value:.3f}") for what, value in found.items()]
    rows.append(Row("W8A8, vLLM to our arithmetic", f"{ratio - 1:+.3%}", f"within {LIMIT:.1%}"))
    publish("vllm_perplexity", rows, {"perplexity": found, "ratio": ratio, "vllm": VLLM.requirements[0]})


class Rounded(W8A8Layer):
    """A W8A8 layer as kernels compute it between tensors in 16 bits: each linear takes them, multiplies in integers and
    float32, and rounds what it gives."""

    def linear(self, role: str, x: Tensor) -> Tensor:
        return super().linear(role, x.float()).to(x.dtype)


def ours(model: Model, layers: Sequence | None, ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Log-probabilities of every token but the first, by our decoder, for each sequence (tokens - 1,)."""
    found = []
    for sequence in ids:
        given = layers or [float_layer(model, n) for n in range(model.geometry.layers)]
        logits = run(model, sequence[None], iter(given), dtype)[0, :-1]
        found.append(logits.double().log_softmax(-1).gather(1, sequence[1:, None])[:, 0])
    return found


def perplexity(log_probabilities: Sequence[Tensor]) -> float:
    return math.exp(-torch.cat(list(log_probabilities)).mean().item())


if __name__ == "__main__":
    main()
