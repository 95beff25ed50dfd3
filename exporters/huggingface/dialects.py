"""The two dialects of INT8 folders: the shapes of scales, and what the folder says of its quantization.

                    compressed-tensors                    modelopt
    weight          int8 (out, in)                        int8 (out, in)
    weight_scale    float32 (out, 1)                      float32 (out,)
    input_scale     float32 (1,), if it is static         float32 ()
    config.json     quantization_config                   quantization_config, as ModelOpt writes it since 0.19
    more                                                  hf_quant_config.json

compressed-tensors is what vLLM and transformers read, modelopt what TensorRT Edge-LLM reads. All scales are steps: the
largest magnitude of weights or inputs over 127. They stay float32 whatever the checkpoint's dtype: rounded to bfloat16
they would be off by up to 0.4 %. Edge-LLM takes hf_quant_config.json where there is one; vLLM, which has no kernel for
W8A8_SQ_PER_CHANNEL, refuses a folder by either.

Formats: https://github.com/vllm-project/compressed-tensors (quantization_config, IntQuantizationCompressor);
https://github.com/NVIDIA/Model-Optimizer (torch/export: get_scaling_factor, convert_hf_quant_config_format);
https://github.com/NVIDIA/TensorRT-Edge-LLM (models/linear.py: INT8SQLinear).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.int8_checkpoint import INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from smoothquant.int8_config import COMPRESSED_TENSORS, HF_QUANT_CONFIG, MODELOPT, SQ_PER_CHANNEL
from smoothquant.scheme import FLOAT, WEIGHTS, Scheme

PRODUCER = {"name": "modelopt"}  # by this name TensorRT-LLM and vLLM know the dialect


@dataclass(frozen=True)
class Dialect:
    """One dialect. row: the shape of one row's weight_scale. number: the shape of an input_scale.

    says: the small JSON files that describe the quantization, by name, from config.json, the scheme and the names of
    the linears that stay in float. static: whether inputs have a static scale in any case. positive: whether who reads
    it wants scales above 0, as TensorRT does.
    """

    name: str
    row: tuple[int, ...]
    number: tuple[int, ...]
    says: Callable[[Mapping[str, Any], Scheme, Sequence[str]], dict[str, dict]]
    static: bool = False
    positive: bool = False

    def plan(self, module: str, shape: tuple[int, ...], scheme: Scheme) -> dict[str, Planned]:
        """The tensors of one matrix, by name. shape: (out, in)."""
        found = {
            module + WEIGHT: Planned(shape, torch.int8),
            module + WEIGHT_SCALE: Planned((shape[0], *self.row), torch.float32),
        }
        if scheme.activations.static:
            found[module + INPUT_SCALE] = Planned(self.number, torch.float32)
        return found

    def shaped(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a matrix as the dialect has it. tensor: int8 (out, in), or float32 (out,) or ()."""
        if name.endswith(WEIGHT_SCALE):
            return tensor.reshape(-1, *self.row)
        return tensor.reshape(self.number) if name.endswith(INPUT_SCALE) else tensor

    def holds(self, scheme: Scheme) -> bool:
        """Whether a folder of this dialect can hold a scheme."""
        usual = (WEIGHTS["per-channel"], FLOAT, FLOAT, FLOAT)
        return (scheme.weights, scheme.kv_cache, scheme.head, scheme.embedding) == usual and (
            scheme.activations.static or not self.static
        )


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict:
    """The `quantization_config` of config.json in compressed-tensors. ignore: linears that stay float."""
    dynamic = not scheme.activations.static
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    return {
        "quant_method": COMPRESSED_TENSORS,
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
        "ignore": list(map(_anywhere, ignore)),
        "kv_cache_scheme": None,
    }


def _anywhere(name: str) -> str:
    """A linear's name for `ignore`; an expert's whatever its MLP is called, since transformers renames Mixtral's."""
    layer, experts, rest = name.partition(".experts.")
    return f"re:^{re.escape(layer.rpartition('.')[0])}\\.[^.]+\\.experts\\.{re.escape(rest)}$" if experts else name


def _compressed_tensors(config: Mapping[str, Any], scheme: Scheme, in_float: Sequence[str]) -> dict[str, dict]:
    return {"config.json": {**config, "quantization_config": quantization_config(scheme, in_float)}}


def _modelopt(config: Mapping[str, Any], scheme: Scheme, in_float: Sequence[str]) -> dict[str, dict]:
    embedded = {
        "ignore": list(in_float),
        "quant_algo": SQ_PER_CHANNEL,
        "producer": PRODUCER,
        "quant_method": MODELOPT,
    }
    said = {"quant_algo": SQ_PER_CHANNEL, "kv_cache_quant_algo": None, "exclude_modules": list(in_float)}
    return {
        "config.json": {**config, "quantization_config": embedded},
        HF_QUANT_CONFIG: {"producer": PRODUCER, "quantization": said},
    }


DIALECTS: Mapping[str, Dialect] = {
    COMPRESSED_TENSORS: Dialect(COMPRESSED_TENSORS, (1,), (1,), _compressed_tensors),
    MODELOPT: Dialect(MODELOPT, (), (), _modelopt, static=True, positive=True),
}
