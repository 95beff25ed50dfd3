"""Whether a rotation of the residual stream and of the heads helps W8A8, beside what a search finds without one.

    python -m tests.benchmarks.rotation MODEL TEXT [MODEL TEXT ...]     # of Llama's layout

Norms are folded into the linears behind them; then a random orthogonal matrix turns the residual stream, and another
one the values of every kv head. The model stays the same function (QuaRot, Ashkboos et al., 2024, without the rotations
at run time), but its head is its own from then on. Both models are searched alike; what counts is the KL to their
common float model, with all linears in INT8.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from act_scales.search import Wanted, search
from act_scales.text import load_text
from recipes.families import open_model
from smoothquant.plan import Plan
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.results import Row, publish

ALPHA = 0.85
SAMPLES, LENGTH = 24, 512
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rotated(folder: Path, out: Path) -> None:
    """Write the same model, float32, with its residual stream and its values rotated. It has a head of its own."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    turn, turn_head = _orthogonal(hidden), _orthogonal(size)
    head = tensors.get(HEAD, tensors[EMBEDDING]) * tensors["model.norm.weight"]
    tensors[HEAD], tensors[EMBEDDING] = head @ turn, tensors[EMBEDDING] @ turn
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.float64)
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        readers = {"input_layernorm": "self_attn.{}_proj", "post_attention_layernorm": "mlp.{}_proj"}
        for norm, reader in readers.items():
            gain = tensors[f"{start}{norm}.weight"]
            for kind in ("q", "k", "v") if reader.startswith("self") else ("gate", "up"):
                name = f"{start}{reader.format(kind)}.weight"
                tensors[name] = tensors[name] * gain @ turn
            tensors[f"{start}{norm}.weight"] = torch.ones_like(gain)
        for name in (f"{start}self_attn.o_proj.weight", f"{start}mlp.down_proj.weight"):
            tensors[name] = turn.T @ tensors[name]
        values, output = f"{start}self_attn.v_proj.weight", f"{start}self_attn.o_proj.weight"
        tensors[values] = (turn_head.T @ tensors[values].view(-1, size, hidden)).reshape(-1, hidden)
        tensors[output] = (tensors[output].view(hidden, -1, size) @ turn_head).reshape(hidden, -1)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    config |= {"tie_word_embeddings": False, "torch_dtype": "float32", "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, out)


def _orthogonal(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def main(*given: str) -> None:
    rows, details = [], {}
    for folder, text_file in zip(map(Path, given[::2]), given[1::2], strict=True):
        found = measured(folder, text_file)
        details[folder.resolve().name] = {name: facts_of(plan) for name, plan in found.items()}
        for name, plan in found.items():
            best = plan.facts.curve[0]
            told = f"KL {best.kl:.4f}, perplexity {best.perplexity_ratio - 1:+.2%}, scales {best.name}"
            rows.append(Row(f"{folder.resolve().name}, {name}", told))
    publish("rotation", rows, {"samples": SAMPLES, "length": LENGTH, "models": details})


def measured(folder: Path, text_file: str) -> dict[str, Plan]:
    """The plans of a model as it is, and rotated."""
    with tempfile.TemporaryDirectory() as scratch:
        rotated(folder, Path(scratch) / "rotated")
        found = {}
        for name, place in {"as it is": folder, "rotated": Path(scratch) / "rotated"}.items():
            text = load_text(text_file, folder, SAMPLES, LENGTH)
            wanted = Wanted(settings=SmoothingSettings(ALPHA))
            found[name] = search(open_model(place), text, Path(scratch) / f"{name} plan", wanted)
        return found


def facts_of(plan: Plan) -> dict:
    """What models of a plan compute, as JSON values."""
    return {part: [vars(one) for one in getattr(plan.facts, part)] for part in ("candidates", "curve")}


if __name__ == "__main__":
    main(*sys.argv[1:])
