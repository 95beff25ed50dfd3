"""A TensorRT-LLM checkpoint, from which `trtllm-build` makes engines: all ranks in one pass over the layers.

    config.json                the decoder, its numbers, mapping and quantization        (`config`)
    rank0.safetensors, ...     the tensors of each rank                                  (`tensors`, `outer`)
    tokenizer files; smoothquant/smoothing.safetensors, smoothquant/manifest.json

Every tensor lands at its place in its rank's file as soon as its layer is quantized: memory is a layer, not a model,
however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from exporters.export import Source, check_outputs, check_static
from exporters.safetensors_files import Planned, SafetensorsFile
from exporters.sidecars import copy_tokenizer
from exporters.trtllm.config import config
from exporters.trtllm.modes import MODES, Mode
from exporters.trtllm.outer import Outer, outer_tensors
from exporters.trtllm.ranks import Ranks
from exporters.trtllm.suitable import check_ranks, decoder_of
from exporters.trtllm.tensors import LayerTensors
from exporters.trtllm.versions import STABLE, check_version
from smoothquant.errors import ContractError, UserError
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.settings import KV_CACHES, SmoothingSettings
from smoothquant.stream import QuantizedLayer, QuantizedLinear, SmoothedLayer
from smoothquant.workspace import Workspace, write_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class TrtllmWriter:
    """Writes the checkpoint to the folder `out`.

    mode: quant_algo. ranks: tensor and pipeline parallelism. dtype: "float16" or "bfloat16", of everything that is
    neither INT8 nor a scale. kv: "float" or "int8", the KV cache. version: of TensorRT-LLM, that will build the engine.
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
        self.settings: Mapping = {
            "activations": mode.activations,
            "weights": mode.weights,
            "quant_algo": mode.algo,
            "dtype": dtype,
            "kv_cache": kv,
            "tp": ranks.tp,
            "pp": ranks.pp,
            "trtllm_version": version,
        }

    def check(self, source: Source) -> None:
        check_ranks(source.model, decoder_of(source.model, self.mode), self.mode, self.ranks)
        self._check_smoothing(source.settings)
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
        self.tensors = self._tensors(model)
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
        for name, sharded in self.tensors.of(quantized, layer.output_absmax, self._cache_scale(layer)):
            full = f"transformer.layers.{local}.{name}"
            for rank, file in enumerate(self._files(stage)):
                file.write(full, self._finite(full, sharded.of(rank, self.ranks.tp)))

    def end(self) -> None:
        for outer in outer_tensors(self.model):
            outer.write(self.model, self._files(0 if outer.first else self.ranks.pp - 1), self._cast)
        decoder, alpha = decoder_of(self.model, self.mode), self.work.inputs["smoothing"]["alpha"]
        content = config(self.model, decoder, self.mode, self.ranks, self.dtype, self.kv, alpha)
        write_json(self.work.path("config.json"), content)
        copy_tokenizer(self.model, self.work.folder)

    def _cache_scale(self, layer: SmoothedLayer) -> Tensor | None:
        if self.kv == "float":
            return None
        assert layer.cache_scales is not None  # `check` has seen to it
        return layer.cache_scales[0]  # keys' and values': with this kind of cache they share it

    def _check_smoothing(self, settings: SmoothingSettings) -> None:
        """That whatever is left for run time is what this form has a place for, in its dtype."""
        possible = ("unfolded", "none") if not self.mode.plugin else ("default", "paper", "none", "run-time")
        if settings.groups not in possible:
            raise UserError(
                f"{self.mode.algo} with smoothing groups {settings.groups!r}", expected=f"one of {', '.join(possible)}"
            )
        if settings.at_run_time and settings.smoother_dtype != self.dtype:
            raise UserError(f"run-time scales in {settings.smoother_dtype}", expected=f"the engine's {self.dtype}")
        if settings.kv_cache != self.kv:
            raise UserError(f"smoothing for a KV cache in {settings.kv_cache}", expected=f"{self.kv}, as the engine's")

    def _files(self, stage: int) -> list[SafetensorsFile]:
        return [self.files[rank] for rank in self.ranks.ranks(stage)]

    def _tensors(self, model: Model) -> LayerTensors:
        return LayerTensors(model, self.mode, DTYPES[self.dtype], self.ranks.tp)

    def _plan_stage(self, model: Model, stage: int) -> dict[str, Planned]:
        """The tensors of each rank of a stage: what the layers come to, tried on tensors without content."""
        dtype, tp, layers = DTYPES[self.dtype], self.ranks.tp, model.geometry.layers
        layer, output_absmax, number = _example(model)
        example = list(self._tensors(model).of(layer, output_absmax, number if self.kv == "int8" else None))
        parts = {name: sharded.of(0, tp) for name, sharded in example}

        def outside(first: bool) -> dict[str, Planned]:
            mine: list[Outer] = [outer for outer in outer_tensors(model) if outer.first == first]
            return {outer.name: outer.plan(model, dtype, tp) for outer in mine}

        plan = outside(first=True) if stage == 0 else {}
        for local in range(layers // self.ranks.pp):
            for name, part in parts.items():
                plan[f"transformer.layers.{local}.{name}"] = Planned(tuple(part.shape), part.dtype)
        return plan | (outside(first=False) if stage == self.ranks.pp - 1 else {})

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        return self._finite(name, tensor.to(DTYPES[self.dtype]))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ContractError(f"{name} overflows {tensor.dtype}", do="lower alpha, or export with --dtype bfloat16")
        return tensor


def _example(model: Model) -> tuple[QuantizedLayer, dict[str, Tensor], Tensor]:
    """A layer, its output ranges and its cache's scale, of the model's shapes: one number each, seen everywhere.
    (Tensors on the meta device would do, but the first of them makes PyTorch import 80 MB.)"""
    family, geometry = model.family, model.geometry
    number = torch.ones(())
    linears, outputs = {}, {}
    for role in model.quantized_roles:
        rows, columns = family.shape(role, geometry)
        outputs[role] = number.expand(rows)
        bias = outputs[role] if family.has_bias(role, geometry) else None
        weight = number.to(torch.int8).expand(rows, columns)
        linears[role] = QuantizedLinear(role, weight, outputs[role], number, bias)
    channels = number.expand(geometry.hidden_size)
    norm = Norm(family.norm, channels, channels if family.norm == "layer" else None)
    return QuantizedLayer(0, linears, {}, dict.fromkeys(family.norms, norm)), outputs, number
