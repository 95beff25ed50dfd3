"""Load experts as linears in transformers, which would otherwise fuse them into one tensor.

transformers >= 5 keeps all experts of a layer in two parameters of three dimensions. A W8A8 checkpoint has an int8
matrix and its scales for each linear of each expert, as vLLM reads them. transformers 5.23 cannot load these, because
its fusing drops int8 weights. Inside `linear_experts()` transformers builds the experts as modules of linears instead,
through its hook for that purpose (`quantizers.base.MODULES_TO_PATCH_FOR_QUANTIZATION`), and renames only the tensors
that it must. Loading, attention, routing and the quantized arithmetic stay those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant.activations import ACTIVATIONS
from smoothquant.errors import UserError


@dataclass(frozen=True)
class Packed:
    """The way in which transformers packs the experts of a model.

    module: the name of its class for all experts of a layer. gate, up, down: the names of an expert's linears on disk.
    inner: the key of config.json with the number of an expert's channels. renamed: parts of names on disk, with their
    names in transformers.
    """

    module: str
    gate: str
    up: str
    down: str
    inner: str
    renamed: Mapping[str, str]


PACKED: Mapping[str, Packed] = {  # by model_type
    "mixtral": Packed("MixtralExperts", "w1", "w3", "w2", "intermediate_size", {".block_sparse_moe.": ".mlp."}),
    "qwen3_moe": Packed("Qwen3MoeExperts", "gate_proj", "up_proj", "down_proj", "moe_intermediate_size", {}),
}


class Expert(nn.Module):
    """One expert. Its linears have their names on disk."""

    def __init__(self, config: Any, packed: Packed) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, getattr(config, packed.inner)
        self.packed, self.activation = packed, ACTIVATIONS[config.hidden_act]
        for name in (packed.gate, packed.up):
            self.add_module(name, nn.Linear(hidden, inner, bias=False))
        self.add_module(packed.down, nn.Linear(inner, hidden, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in (self.packed.gate, self.packed.up, self.packed.down))
        return down(self.activation(gate(x)) * up(x))


class LinearExperts(nn.ModuleList):
    """All experts of a layer, with the call of transformers' class.

    x: (tokens, hidden). chosen, shares: the indices and weights of each token's experts, (tokens, experts per token).
    """

    def __init__(self, config: Any) -> None:
        packed = PACKED[config.model_type]
        super().__init__(Expert(config, packed) for _ in range(config.num_local_experts))

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for index, expert in enumerate(self):
            rows, place = torch.where(chosen == index)
            if len(rows):
                y.index_add_(0, rows, expert(x[rows]) * shares[rows, place, None])
        return y


@contextmanager
def linear_experts(model_type: str) -> Iterator[None]:
    """Make transformers load experts as linears, for the length of a block.

    The block changes tables of transformers, so only one thread may be in it. Raises UserError if this version of
    transformers lacks the hook.
    """
    packed = PACKED[model_type]
    try:
        from transformers import conversion_mapping
        from transformers.core_model_loading import WeightRenaming
        from transformers.quantizers import base
        from transformers.utils.quantization_config import QuantizationMethod

        patches = base.MODULES_TO_PATCH_FOR_QUANTIZATION
        before = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    except (ImportError, AttributeError) as error:
        raise UserError(
            "this version of transformers cannot run W8A8 experts",
            expected="a version that can build experts as linears",
            do="pip install 'transformers>=5.23.0' (Python 3.11 or later), or serve the folder with vLLM",
        ) from error
    patches[packed.module] = {
        "module_name": LinearExperts,
        "quantization_methods": [QuantizationMethod.COMPRESSED_TENSORS],
    }
    renamed: list[Any] = [WeightRenaming(*names) for names in packed.renamed.items()]
    conversion_mapping.register_checkpoint_conversion_mapping(model_type, renamed, overwrite=True)
    try:
        yield
    finally:
        del patches[packed.module]
        conversion_mapping.register_checkpoint_conversion_mapping(model_type, before, overwrite=True)
