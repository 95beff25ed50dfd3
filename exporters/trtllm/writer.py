"""A TensorRT-LLM checkpoint, from which `trtllm-build` makes engines: all ranks in one pass over the layers.

    config.json                the decoder, its numbers, mapping and quantization        (`decoders`)
    rank0.safetensors, ...     the tensors of each rank                                  (`tensors`, `sharding`)
    tokenizer files; smoothquant/smoothing.safetensors, smoothquant/manifest.json

Every tensor lands at its place in its rank's file as soon as its layer is quantized: memory is a layer, not a model,
however many ranks there are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from exporters.export import Source, check_outputs, check_static
from exporters.sidecars import copy_tokenizer
from exporters.trtllm.decoders import config
from exporters.trtllm.modes import MODES, Mode
from exporters.trtllm.sharding import Ranks, outer_tensors
from exporters.trtllm.suitable import check_model, decoder_of
from exporters.trtllm.tensors import LayerContent, LayerTensor, LayerTensors
from exporters.trtllm.versions import STABLE, check_version
from smoothquant.artifacts.manifest import TrtllmOptions
from smoothquant.artifacts.safetensors_files import Planned, SafetensorsFile
from smoothquant.capacity import Capacity
from smoothquant.errors import ContractError, UserError
from smoothquant.model import Model
from smoothquant.scheme import scheme_of
from smoothquant.settings import GROUPS, KV_CACHES
from smoothquant.stream import QuantizedLayer, SmoothedLayer
from smoothquant.workspace import Workspace, write_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(model: Model) -> str:
    """The dtype that an engine of this model has unless it is told: the model's, float16 for float32."""
    return "bfloat16" if model.checkpoint.dtype == torch.bfloat16 else "float16"


def capacity(mode: Mode, dtype: str, kv: str = "float") -> Capacity:
    """What the checkpoint of a mode holds of smoothing. dtype: of its engines; kv: "float" or "int8"."""
    groups = (*GROUPS, "run-time") if mode.plugin else ("unfolded", "none")
    return Capacity(f"{mode.algo}, {kv} KV cache", groups, dtype, kv == "int8")


class TrtllmWriter:
    """Writes the checkpoint to the folder `out`.

    mode: the quant_algo. ranks: tensor and pipeline parallelism. dtype: "float16" or "bfloat16", the dtype of
    everything that is neither INT8 nor a scale. kv: "float" or "int8", the KV cache. version: the TensorRT-LLM
    that will build the engine.
    """

    step = "export trtllm"

    def __init__(
        self,
        out: str | Path,
        mode: Mode = MODES[0],
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        dtype: str = "float16",
        kv: str = "float",
        version: str = STABLE,
    ) -> None:
        for what, value, choices in (("dtype", dtype, DTYPES), ("KV cache", kv, KV_CACHES)):
            if value not in choices:
                raise UserError(f"TensorRT-LLM export: {what} {value!r}", expected=f"one of {', '.join(choices)}")
        check_version(version)
        self.out, self.mode, self.ranks, self.kv, self.version = Path(out), mode, ranks, kv, version
        self.dtype = dtype
        self.weights: str | None = mode.weights
        self.smoothing = capacity(mode, dtype, kv)
        cache = "int8-shared" if kv == "int8" else kv
        self.schemes = (scheme_of(mode.activations, mode.weights, cache),)
        self.options = {"trtllm": TrtllmOptions(mode.algo, dtype, ranks.tp, ranks.pp, version)}

    def check(self, source: Source) -> None:
        self.alpha = source.settings.alpha
        check_model(source.model, self.mode, self.ranks)
        if self.mode.static:
            check_static(source, self.out)
        static = self.mode.static and self.mode.plugin
        for needed, why in ((static, "static activations"), (self.kv == "int8", "an INT8 KV cache")):
            if needed:
                check_outputs(source, f"{self.out}: {why}")

    def nbytes(self, model: Model) -> int:
        stages = (self._plan_stage(model, stage) for stage in range(self.ranks.pp))
        return self.ranks.tp * sum(planned.nbytes for plan in stages for planned in plan.values())

    def begin(self, model: Model, work: Workspace) -> None:
        self.model, self.work = model, work
        self.tensors = self._layer_tensors(model)
        self.files = [
            SafetensorsFile(work.path(f"rank{rank}.safetensors"), plan)
            for stage in range(self.ranks.pp)
            for plan in [self._plan_stage(model, stage)]
            for rank in self.ranks.ranks(stage)
        ]

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        assert quantized is not None  # promised by the attribute `weights`
        layers = self.model.geometry.layers
        stage, local = self.ranks.stage(layer.index, layers), self.ranks.local(layer.index, layers)
        content = LayerContent(quantized, layer.output_absmax, layer.cache_scales[0] if layer.cache_scales else None)
        for tensor in self.tensors:
            full, sharded = _full(local, tensor), tensor.content(content)
            for rank, file in enumerate(self._files(stage)):
                file.write(full, self._finite(full, sharded.of(rank, self.ranks.tp)))

    def end(self) -> None:
        for outer in outer_tensors(self.model):
            outer.write(self.model, self._files(0 if outer.first else self.ranks.pp - 1), self._cast)
        decoder = decoder_of(self.model, self.mode)
        content = config(self.model, decoder, self.mode, self.ranks, self.dtype, self.kv, self.alpha)
        write_json(self.work.path("config.json"), content)
        copy_tokenizer(self.model, self.work.folder)

    def _files(self, stage: int) -> list[SafetensorsFile]:
        return [self.files[rank] for rank in self.ranks.ranks(stage)]

    def _plan_stage(self, model: Model, stage: int) -> dict[str, Planned]:
        """The tensors of each rank of a stage, in the order on disk."""
        dtype, tp, layers = DTYPES[self.dtype], self.ranks.tp, model.geometry.layers

        def outside(first: bool) -> dict[str, Planned]:
            mine = [outer for outer in outer_tensors(model) if outer.first == first]
            return {outer.name: outer.plan(model, dtype, tp) for outer in mine}

        plan = outside(first=True) if stage == 0 else {}
        tensors = self._layer_tensors(model)
        for local in range(layers // self.ranks.pp):
            plan |= {_full(local, tensor): Planned(tensor.shape, tensor.dtype) for tensor in tensors}
        return plan | (outside(first=False) if stage == self.ranks.pp - 1 else {})

    def _layer_tensors(self, model: Model) -> tuple[LayerTensor, ...]:
        dtype, int8_cache = DTYPES[self.dtype], self.kv == "int8"
        return tuple(LayerTensors(model, self.mode, dtype, self.ranks.tp, int8_cache).planned())

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        return self._finite(name, tensor.to(DTYPES[self.dtype]))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ContractError(f"{name} overflows {tensor.dtype}", do="lower alpha, or export with --dtype bfloat16")
        return tensor


def _full(local: int, tensor: LayerTensor) -> str:
    """Name of a layer's tensor in its stage's files. local: the layer's index in its stage."""
    return f"transformer.layers.{local}.{tensor.name}"
