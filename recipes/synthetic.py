"""Random Llamas of any size, for measuring speed and memory where no trained model is needed.

Written tensor by tensor: a model of any size needs the memory of its largest matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.llama import FAMILY
from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.artifacts.shards import SafetensorsShards
from smoothquant.config import Config
from smoothquant.data_file import DataFile
from smoothquant.family import Geometry
from smoothquant.files import make_folder, write_json

ROWS = 4096  # rows made at a time


def save_random_llama(
    folder: Path,
    *,
    hidden: int = 2048,
    intermediate: int = 5632,
    layers: int = 4,
    heads: int = 32,
    kv_heads: int = 8,
    vocabulary: int = 32000,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Geometry:
    """Write a Llama with normal weights (std 0.02) and unit norms to `folder`, without a tokenizer."""
    make_folder(folder)
    config = {
        "architectures": list(FAMILY.architectures),
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
    geometry = FAMILY.geometry(Config(config))
    shapes = FAMILY.tensors(geometry)
    files = SafetensorsShards(_Folder(folder), {name: Planned(shape, dtype) for name, shape in shapes.items()})
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if len(shape) == 1:
            files.write(name, torch.ones(shape, dtype=dtype))
        else:
            files.write_rows(name, _normal_rows(shape, dtype, generator))
    return geometry


@dataclass(frozen=True)
class _Folder:
    """A folder that is filled at once."""

    root: Path

    def data(self, name: str) -> DataFile:
        return DataFile(self.root / name)

    def path(self, name: str) -> Path:
        return self.root / name


def _normal_rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for start in range(0, shape[0], ROWS):
        rows = min(ROWS, shape[0] - start)
        yield (torch.randn(rows, *shape[1:], generator=generator) * 0.02).to(dtype)
