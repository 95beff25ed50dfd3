"""The smoothed float model: the same function, with weights that any W8A8 quantizer takes well.

A plain Hugging Face checkpoint of the same architecture; `AutoModelForCausalLM.from_pretrained` loads it as is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from exporters.export import Source, check_folded
from exporters.sidecars import copy_tokenizer
from smoothquant.artifacts.manifest import HuggingFaceOptions
from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.artifacts.shards import MAX_SHARD, SafetensorsShards
from smoothquant.errors import ContractError
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.scheme import scheme_of
from smoothquant.stream import QuantizedLayer, SmoothedLayer
from smoothquant.workspace import Workspace, write_json


class SmoothedWriter:
    """Writes the smoothed float checkpoint to the folder `out`.

    dtype: of the weights; None keeps each tensor's own. In a 16-bit dtype the smoothed weights are rounded once more
    than the original's were.
    """

    step = "export hf"
    weights: str | None = None

    def __init__(self, out: str | Path, dtype: torch.dtype | None = None, max_shard: int = MAX_SHARD) -> None:
        self.out, self.dtype, self.max_shard = Path(out), dtype, max_shard
        self.schemes = (scheme_of("float"),)
        self.options = {"hf": HuggingFaceOptions(str(dtype).removeprefix("torch.") if dtype else "as stored")}

    def check(self, source: Source) -> None:
        check_folded(source, self.out)

    def nbytes(self, model: Model) -> int:
        return sum(planned.nbytes for planned in self._plan(model).values())

    def begin(self, model: Model, work: Workspace) -> None:
        self.model, self.work = model, work
        self.files = SafetensorsShards(work.folder, self._plan(model), self.max_shard)

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        model = self.model
        for name, tensor in norm_tensors(model, layer.index, layer.norms):
            self._put(name, tensor)
        for name, roles in model.stored.items():
            full = model.family.module(layer.index, name)
            self._put(f"{full}.weight", model.join(name, {role: layer.weight(role) for role in roles}))
            biases = {role: bias for role in roles if (bias := layer.bias(role)) is not None}
            if biases:
                self._put(f"{full}.bias", model.join(name, biases))

    def end(self) -> None:
        for name in unsmoothed(self.model):
            dtype = self.files.plan[name].dtype
            self.files.write_rows(name, (rows.to(dtype) for rows in self.model.rows(name)))
        config = dict(self.model.checkpoint.config)
        if self.dtype:
            config["dtype"] = config["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        write_json(self.work.path("config.json"), config)
        copy_tokenizer(self.model, self.work.folder)

    def _plan(self, model: Model) -> dict[str, Planned]:
        return {name: Planned(shape, self.dtype or model.info(name).dtype) for name, shape in model.expected().items()}

    def _put(self, name: str, tensor: Tensor) -> None:
        rounded = tensor.to(self.files.plan[name].dtype)
        if not rounded.isfinite().all():
            raise ContractError(
                f"{name}: the smoothed weight overflows {rounded.dtype}",
                do="lower alpha, or export with --dtype float32",
            )
        self.files.write(name, rounded)


def norm_tensors(model: Model, layer: int, norms: Mapping[str, Norm]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a layer's norms."""
    for role, norm in norms.items():
        name = model.norm(layer, role)
        yield f"{name}.weight", norm.weight
        if norm.bias is not None:
            yield f"{name}.bias", norm.bias


def unsmoothed(model: Model) -> tuple[str, ...]:
    """Tensors outside the layers: embedding, final norm and, unless tied, lm_head."""
    prefix = model.family.layer.split("{}")[0]
    return tuple(name for name in model.expected() if not name.startswith(prefix))
