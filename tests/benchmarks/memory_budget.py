"""Peak memory of one layer of a 530B model (hidden 20480, MLP 81920, 128 heads: 10 GB in bfloat16) with --memory 2GB.

The checkpoint is an OPT, most of whose numbers are zeros that take no room on the disk; what is read and written is as
much as of any other. Every command is a process of its own. Target: the budget, in resident memory.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from act_scales.store import ActScales
from recipes.families import open_model
from recipes.opt import FAMILY
from smoothquant.artifacts.safetensors_files import Planned, SafetensorsFile
from smoothquant.config import Config
from smoothquant.data_file import DataFile
from smoothquant.files import write_json
from tests.benchmarks.export_memory import measured
from tests.benchmarks.results import Row, publish
from tests.models import save_tokenizer

BUDGET = "2GB"
LIMIT = 2000  # MB
HIDDEN, VOCABULARY = 20480, 51200
ROWS = 96  # of every matrix, that are not zero
EXPORTS: Mapping[str, tuple[str, ...]] = {
    "export w8a8": ("w8a8",),
    "export onnx": ("onnx", "--dtype", "fp16"),
    "export trtllm": ("trtllm", "--act", "per-tensor", "--tp", "8"),
}


def main() -> None:
    rows, details = [], {}
    asked = sys.argv[1:] or ["calibrate", *EXPORTS]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_sparse_opt(folder / "model")
        (folder / "text.txt").write_text("All models are wrong, but some are useful. " * 60)
        scales, out = folder / "scales.safetensors", folder / "out"
        linears = list(open_model(folder / "model").linears())
        ranges = [{name: torch.rand(shape[side]) + 0.5 for name, shape in linears} for side in (1, 0)]
        ActScales(*ranges).save(scales)
        for what in asked:
            if what in EXPORTS:
                target, *options = EXPORTS[what]
                arguments = ["export", target, str(folder / "model"), str(scales), "--out", str(out), *options]
            else:
                text = ["--text", str(folder / "text.txt"), "--samples", "2", "--length", "512"]
                arguments = ["calibrate", str(folder / "model"), *text, "--out", str(folder / "found.safetensors")]
            command = [sys.executable, "-m", "recipes.cli", *arguments, "--memory", BUDGET, "--quiet"]
            seconds, peak, _ = measured(command)
            shutil.rmtree(out, ignore_errors=True)
            rows.append(
                Row(f"peak memory, {what}, a 530B layer, --memory {BUDGET}", f"{peak:.0f} MB", f"<= {LIMIT} MB")
            )
            details[what] = {"peak_mb": peak, "seconds": seconds}
            publish("memory_budget", rows, details)  # of those so far: all together take a quarter of an hour


def save_sparse_opt(folder: Path) -> None:
    """Write the checkpoint, and a tokenizer."""
    folder.mkdir()
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": HIDDEN,
        "ffn_dim": 4 * HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 128,
        "vocab_size": VOCABULARY,
        "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    save_tokenizer(folder)
    shapes = FAMILY.tensors(FAMILY.geometry(Config(config)))
    file = SafetensorsFile(
        DataFile(folder / "model.safetensors"), {name: Planned(shape, torch.bfloat16) for name, shape in shapes.items()}
    )
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        if len(shape) == 1:
            file.write(name, torch.ones(shape, dtype=torch.bfloat16))
        else:
            some = torch.randn(ROWS, *shape[1:], generator=generator) * 0.02
            for row in (0, shape[0] // 2):
                file.write_part(name, some.bfloat16(), row)


if __name__ == "__main__":
    main()
