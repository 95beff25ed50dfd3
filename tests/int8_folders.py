"""INT8 folders as other tools write them, by the plainest means: no code of ours has a part in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INPUT_STEP = 0.05
ARGUMENTS = {  # as compressed-tensors dumps them
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "block_structure": None,
    "actorder": None,
    "observer": "minmax",
    "observer_kwargs": {},
}


def compressed_tensors(strategy: str = "channel", *, static: bool = False) -> dict[str, Any]:
    """The quantization_config of config.json as llm-compressor writes it."""
    inputs = {"strategy": "tensor", "dynamic": False} if static else {"strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "version": "0.20.0",
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "int-quantized",
                "weights": {**ARGUMENTS, "strategy": strategy, "dynamic": False},
                "input_activations": {**ARGUMENTS, **inputs},
                "output_activations": None,
            }
        },
    }


def modelopt() -> dict[str, Any]:
    """The content of hf_quant_config.json as ModelOpt writes it."""
    return {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": "W8A8_SQ_PER_CHANNEL",
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head"],
        },
    }


def linears(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the matrices of a Llama's layers."""
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def rounded(weight: Tensor, strategy: str = "channel") -> tuple[Tensor, Tensor]:
    """int8 (out, in) and its steps, float32 (out,) or (1,)."""
    steps = weight.float().abs().amax(dim=1) / 127
    steps = steps if strategy == "channel" else steps.amax()[None]
    return (weight.float() / steps[:, None]).round().to(torch.int8), steps


def save_compressed_tensors(
    model: Path,
    out: Path,
    strategy: str = "channel",
    *,
    static: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> Path:
    """A Llama's folder in compressed-tensors' form."""
    tensors = load_file(model / "model.safetensors")
    for name in linears(tensors):
        tensors[f"{name}.weight"], steps = rounded(tensors[f"{name}.weight"], strategy)
        tensors[f"{name}.weight_scale"] = (steps[:, None] if strategy == "channel" else steps).to(scale_dtype)
        if static:
            tensors[f"{name}.input_scale"] = torch.tensor([INPUT_STEP], dtype=scale_dtype)
    save(model, out, tensors, {"quantization_config": compressed_tensors(strategy, static=static)})
    return out


def save_modelopt(model: Path, out: Path, smoothing: Mapping[str, Tensor] | None = None) -> Path:
    """A Llama's folder in ModelOpt's form. smoothing: pre_quant_scale (in,) by linear, undone in its weight."""
    tensors, smoothing = load_file(model / "model.safetensors"), smoothing or {}
    for name in linears(tensors):
        weight = tensors[f"{name}.weight"].float()
        if name in smoothing:
            weight = weight / smoothing[name].float()
            tensors[f"{name}.pre_quant_scale"] = smoothing[name].clone()  # not shared: safetensors refuses that
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = rounded(weight)
        tensors[f"{name}.input_scale"] = torch.tensor(INPUT_STEP)
    save(model, out, tensors, {})
    (out / "hf_quant_config.json").write_text(json.dumps(modelopt()))
    return out


def save(model: Path, out: Path, tensors: Mapping[str, Tensor], more: Mapping[str, Any]) -> None:
    """A model folder with other tensors and more in its config.json."""
    shutil.copytree(model, out)
    save_file(dict(tensors), out / "model.safetensors", {"format": "pt"})
    edit_json(out / "config.json", more)


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(changes)))
