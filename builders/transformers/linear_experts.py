"""Experts as linears in transformers, where it would fuse them into one tensor.

transformers >= 5 keeps all experts of a Mixtral in two parameters of three dimensions. A W8A8 checkpoint has an int8
matrix with its scales for each linear of each expert, as vLLM wants it; transformers 5.23 cannot load that: its fusing
drops int8 weights. Inside `linear_experts()` it builds the experts as modules of linears instead, by a hook that it has
for that purpose (`quantizers.base.MODULES_TO_PATCH_FOR_QUANTIZATION`), and renames only what it must; loading,
attention, routing and the quantized arithmetic stay its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant.activations import ACTIVATIONS
from smoothquant.errors import UserError


class Expert(nn.Module):
    """One expert, its linears named as on disk."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.w1, self.w3 = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class LinearExperts(nn.ModuleList):
    """Called as transformers' own: x (tokens, hidden); chosen, shares (tokens, experts per token)."""

    def __init__(self, config: Any) -> None:
        super().__init__(Expert(config) for _ in range(config.num_local_experts))

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for index, expert in enumerate(self):
            rows, place = torch.where(chosen == index)
            if len(rows):
                y.index_add_(0, rows, expert(x[rows]) * shares[rows, place, None])
        return y


@contextmanager
def linear_experts() -> Iterator[None]:
    """While a quantized Mixtral is loaded. Changes transformers' tables meanwhile: one thread at a time.

    Raises UserError if this version of transformers has no such hook.
    """
    try:
        from transformers import conversion_mapping
        from transformers.core_model_loading import WeightRenaming
        from transformers.quantizers import base
        from transformers.utils.quantization_config import QuantizationMethod

        patches = base.MODULES_TO_PATCH_FOR_QUANTIZATION
        before = conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    except (ImportError, AttributeError) as error:
        raise UserError(
            "this version of transformers cannot run W8A8 experts",
            expected="one that can build experts as linears",
            do="pip install transformers==5.23.0, or serve the folder with vLLM",
        ) from error
    patches["MixtralExperts"] = {
        "module_name": LinearExperts,
        "quantization_methods": [QuantizationMethod.COMPRESSED_TENSORS],
    }
    renamed: list[Any] = [WeightRenaming(".block_sparse_moe.", ".mlp.")]
    conversion_mapping.register_checkpoint_conversion_mapping("mixtral", renamed, overwrite=True)
    try:
        yield
    finally:
        del patches["MixtralExperts"]
        conversion_mapping.register_checkpoint_conversion_mapping("mixtral", before, overwrite=True)
