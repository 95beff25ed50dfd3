"""The largest models on a small machine: one layer and two layers of their true widths really run, step by step.

    python -m tests.benchmarks.largest MODEL [STEP ...] [--memory 2GB] [--disk 14]      MODEL: a key of `CONFIGS`

For each step, in a process of its own: seconds and peak memory with one layer and with two. The difference is one
layer's; the first run's hold also what is outside of the layers. Beside it stands what `smoothquant estimate` says of
the whole model by its config.json alone. Every run is written to the result at once.

Layers are dense as far as the disk allows: rows of one random block, again and again, as no step's time depends on
values. The other rows, and those of embedding and head but for the first, are zeros that take no room (holes).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from recipes.families import open_announced
from smoothquant.artifacts.safetensors_files import Planned, SafetensorsFile
from smoothquant.data_file import DataFile
from smoothquant.files import make_folder, write_json
from tests.benchmarks.export_memory import measured
from tests.benchmarks.results import Row, publish
from tests.models import save_tokenizer

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
}
BLOOM = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "layer_norm_epsilon": 1e-5}
CONFIGS: dict[str, dict] = {
    "llama-2-70b": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
    },
    "falcon-180b": {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "alibi": False,
        "bias": False,
        "hidden_size": 14848,
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_attention_heads": 232,
        "num_hidden_layers": 80,
        "num_kv_heads": 8,
        "parallel_attn": True,
        "vocab_size": 65024,
        "torch_dtype": "bfloat16",
    },
    "bloom-176b": {
        **BLOOM,
        "n_embed": 14336,
        "n_layer": 70,
        "num_attention_heads": 112,
        "vocab_size": 250880,
        "torch_dtype": "bfloat16",
    },
    "llama-3.1-405b": {
        **LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16",
    },
    "mt-nlg-like-530b": {  # Megatron-Turing NLG's published sizes, in OPT's layout: its own is not a public one
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 20480,
        "ffn_dim": 81920,
        "num_hidden_layers": 105,
        "num_attention_heads": 128,
        "word_embed_proj_dim": 20480,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    },
}
STEPS = ("calibrate", "export w8a8", "export onnx", "export trtllm")
BLOCK = 1 << 23  # numbers in the random block
RESERVE = 0.4e9  # bytes of disk for act scales, hidden states and all that is small
LEAST = 0.05  # of the layers' rows are dense, or the vocabulary is halved
IN_LAYER = re.compile(r"\.\d+\.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("steps", nargs="*", default=list(STEPS[:2]), metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2], help="none: estimate alone")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory", default="2GB", help="passed on to every step")
    parser.add_argument("--disk", type=float, default=14, help="GB that model and output may take together")
    given = parser.parse_args()
    config = CONFIGS[given.model]
    amount = ["--samples", str(given.samples), "--length", str(given.length)]
    rows: list[Row] = []
    runs: dict[str, dict] = {step: {} for step in given.steps}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        details: dict = {"amount": amount, "memory": given.memory, "disk": given.disk}
        estimates = list(dict.fromkeys([*STEPS[:2], *given.steps]))
        said = estimated(folder / "whole", config, estimates, amount)
        details |= {"threads": torch.get_num_threads(), "estimate": said, "load": _load()}
        vocabulary, share = fitting(folder / "whole", config, given.disk * 1e9 - RESERVE)
        details |= {"vocabulary": vocabulary, "dense": share, "runs": runs}
        keep = partial(publish, f"largest_{given.model}", rows, details, command="largest")
        keep()
        for layers in given.layers:
            shorter = with_layers(config, layers) | {"vocab_size": vocabulary}
            for step, found in run(folder, shorter, share, given.steps, amount, ["--memory", given.memory]):
                runs[step][str(layers)] = found
                words = f"{found['seconds']:.0f} s ({found['processor']:.0f} s of processor), {found['peak_mb']:.0f} MB"
                rows.append(Row(f"{given.model}, {step}, layers: {layers}", words))
                keep()


def estimated(folder: Path, config: dict, steps: list[str], amount: list[str]) -> dict[str, dict]:
    """The steps of the whole model by name, by config.json alone: each export by itself, calibration with the first."""
    make_folder(folder)
    write_json(folder / "config.json", config)
    said: dict[str, dict] = {}
    for step in steps:
        if step not in said:
            target = step.split()[1] if step.startswith("export") else "w8a8"
            words = [str(folder), *amount, "--target", target, "--json", "--quiet"]
            command = [sys.executable, "-m", "recipes.cli", "estimate", *words]
            found = subprocess.run(command, capture_output=True, text=True, check=False)  # 2: too little disk
            said = {one["step"]: one for one in json.loads(found.stdout)["steps"]} | said
    kept = ("memory", "read", "written", "seconds", "seconds_by")
    return {step: {key: said[step][key] for key in kept} for step in steps}


def with_layers(config: dict, layers: int) -> dict:
    return config | {"n_layer" if "n_layer" in config else "num_hidden_layers": layers}


def fitting(folder: Path, config: dict, room: float) -> tuple[int, float]:
    """The vocabulary, and the share of the layers' rows, that two layers and their W8A8 form have room for in bytes."""
    vocabulary = config["vocab_size"]
    while True:
        write_json(folder / "config.json", with_layers(config, 2) | {"vocab_size": vocabulary})
        model = open_announced(folder)
        sizes = {name: torch.Size(shape).numel() for name, shape in model.expected().items()}
        layers = sum(size for name, size in sizes.items() if IN_LAYER.search(name))
        width = model.checkpoint.dtype.itemsize
        left = room - layers - width * (sum(sizes.values()) - layers)
        share = min(1.0, left / (width * layers))
        if share >= LEAST:
            return vocabulary, share
        vocabulary //= 2


def run(
    folder: Path, config: dict, share: float, steps: list[str], amount: list[str], more: list[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each step of a model: its seconds by the clock and of processor, its peak memory in MB, and the machine's load.

    Yields as they come. An export needs the act scales of the calibration before it.
    """
    model, scales, out = (str(folder / name) for name in ("model", "scales.safetensors", "out"))
    save(Path(model), config, share)
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 900)
    for step in steps:
        words = [*step.split(), model, "--text", str(text), *amount, "--out", scales, "--overwrite"]
        if step.startswith("export"):
            words = [*step.split(), model, scales, "--out", out]
        found = measured([sys.executable, "-m", "recipes.cli", *words, *more, "--quiet"])
        shutil.rmtree(out, ignore_errors=True)
        numbers = {"seconds": found.seconds, "processor": found.processor, "peak_mb": found.peak}
        yield step, numbers | {"load": _load()}
    shutil.rmtree(model)


def _load() -> float:
    """How many threads wanted to run on this machine, over the last five minutes."""
    return os.getloadavg()[1]


def save(folder: Path, config: dict, share: float) -> None:
    """Write a model: norms of ones, biases of zeros, and of every layer's matrices this share of random rows."""
    make_folder(folder)
    write_json(folder / "config.json", config)
    model = open_announced(folder)
    dtype, shapes = model.checkpoint.dtype, model.expected()
    file = SafetensorsFile(
        DataFile(folder / "model.safetensors"), {name: Planned(shape, dtype) for name, shape in shapes.items()}
    )
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for name, shape in shapes.items():
        if len(shape) > 1:
            rows = BLOCK // shape[1]
            dense = int(share * shape[0]) if IN_LAYER.search(name) else 0
            for start in range(0, max(rows, dense), rows):
                part = block[: shape[1] * min(rows, shape[0] - start)]
                file.write_part(name, part.view(-1, shape[1]), start)
        elif name.endswith("weight"):
            file.write(name, torch.ones(shape, dtype=dtype))
    save_tokenizer(folder)


if __name__ == "__main__":
    main()
