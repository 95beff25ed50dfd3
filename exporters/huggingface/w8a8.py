"""The W8A8 model in compressed-tensors' int-quantized format, which vLLM serves and transformers loads.

    <linear>.weight        int8 (out, in)
    <linear>.weight_scale  float32 (out, 1)
    <linear>.input_scale   float32 (1,), static activations only
    everything else        as in the float checkpoint, smoothing folded into the norms

    config.json: quantization_config {quant_method: compressed-tensors, format: int-quantized, config_groups: ...}

Scales stay float32 whatever the checkpoint's dtype: rounded to bfloat16 they would be off by up to 0.4 %.
Format: https://github.com/vllm-project/compressed-tensors (quantization_config, IntQuantizationCompressor).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from exporters.huggingface.safetensors_files import MAX_SHARD, Planned, SafetensorsFiles
from exporters.huggingface.smoothed import unsmoothed
from exporters.sidecars import copy_tokenizer
from smoothquant.model import Model
from smoothquant.stream import QuantizedLayer, SmoothedLayer
from smoothquant.workspace import Workspace, write_json


class W8A8Writer:
    """Writes the W8A8 checkpoint to the folder `out`. activations: "per-token" (dynamic) or "per-tensor" (static)."""

    step = "export w8a8"
    quantized = True

    def __init__(self, out: str | Path, activations: str = "per-token", max_shard: int = MAX_SHARD) -> None:
        self.out, self.activations, self.max_shard = Path(out), activations, max_shard
        self.settings: Mapping = {"activations": activations}

    def nbytes(self, model: Model) -> int:
        return sum(planned.nbytes for planned in self._plan(model).values())

    def begin(self, model: Model, work: Workspace) -> None:
        self.model, self.work = model, work
        self.files = SafetensorsFiles(work.folder, self._plan(model), self.max_shard)

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        assert quantized is not None  # promised by the class attribute `quantized`
        for role, gain in quantized.gains.items():
            self.files.write(f"{self.model.norm(layer.index, role)}.weight", gain)
        for linear in quantized.linears.values():
            self.files.write(f"{linear.name}.weight", linear.weight)
            self.files.write(f"{linear.name}.weight_scale", linear.weight_scale[:, None])
            if self.activations == "per-tensor":
                assert linear.input_scale is not None  # `export` has seen to it
                self.files.write(f"{linear.name}.input_scale", linear.input_scale.reshape(1))
            if linear.bias is not None:
                bias = f"{linear.name}.bias"
                self.files.write(bias, linear.bias.to(self.files.plan[bias].dtype))

    def end(self) -> None:
        for name in unsmoothed(self.model):
            self.files.write_rows(name, self.model.rows(name))
        config = dict(self.model.checkpoint.config)
        config["quantization_config"] = quantization_config(self.activations, ignore=[self.model.family.lm_head])
        write_json(self.work.path("config.json"), config)
        copy_tokenizer(self.model, self.work.folder)

    def _plan(self, model: Model) -> dict[str, Planned]:
        linears = {f"{name}.weight": name for name, _ in model.linears()}
        plan = {}
        for tensor, shape in model.expected().items():
            if tensor in linears:
                plan[tensor] = Planned(shape, torch.int8)
                plan[f"{linears[tensor]}.weight_scale"] = Planned((shape[0], 1), torch.float32)
                if self.activations == "per-tensor":
                    plan[f"{linears[tensor]}.input_scale"] = Planned((1,), torch.float32)
            else:
                plan[tensor] = Planned(shape, model.checkpoint.tensors[tensor].dtype)
        return plan


def quantization_config(activations: str, ignore: list[str]) -> dict:
    """The `quantization_config` of config.json. ignore: linears that stay float."""
    dynamic = activations == "per-token"
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic},
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
