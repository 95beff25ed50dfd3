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

from exporters.card import TRTLLM, write_card
from exporters.export import Source, check_outputs, check_static
from exporters.trtllm.decoders import config
from exporters.trtllm.modes import MODES, Mode
from exporters.trtllm.sharding import Ranks, outer_tensors
from exporters.trtllm.suitable import check_dtype, check_model, decoder_of, needs_float16
from exporters.trtllm.tensors import LayerContent, LayerTensors
from exporters.trtllm.versions import STABLE, check_version
from smoothquant.artifacts.manifest import TrtllmOptions
from smoothquant.artifacts.safetensors_files import Planned, SafetensorsFile
from smoothquant.capacity import Capacity
from smoothquant.errors import ContractError, UserError
from smoothquant.files import write_json
from smoothquant.model import Model
from smoothquant.quantization import is_finite
from smoothquant.settings import GROUPS
from smoothquant.sidecars import copy_sidecars
from smoothquant.stream import QuantizedLayer, SmoothedLayer, WeightRows
from smoothquant.workspace import Workspace

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(model: Model, mode: Mode) -> str:
    """The dtype that an engine of this model has unless it is told: the model's, but float16 for float32, and where
    the engine has to be float16."""
    own = "bfloat16" if model.checkpoint.dtype == torch.bfloat16 else "float16"
    return "float16" if needs_float16(model, mode) else own


def capacity(mode: Mode, dtype: str) -> Capacity:
    """What the checkpoint of a mode holds of smoothing. dtype: of its engines."""
    groups = (*GROUPS, "run-time") if mode.plugin else ("unfolded", "none")
    cache = "shared" if mode.cache.quantized else "none"
    return Capacity(f"{mode.algo}, {mode.cache.dtype} KV cache", groups, dtype, cache)


class TrtllmWriter:
    """Writes the checkpoint to the folder `out`.

    mode: the quant_algo, and what is INT8. ranks: tensor and pipeline parallelism. dtype: "float16" or "bfloat16", the
    dtype of everything that is neither INT8 nor a scale. version: the TensorRT-LLM that will build the engine.
    """

    step = "export trtllm"
    wider = "export with --dtype bfloat16"

    def __init__(
        self,
        out: str | Path,
        mode: Mode = MODES[0],
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        dtype: str = "float16",
        version: str = STABLE,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"TensorRT-LLM export: dtype {dtype!r}", expected=f"one of {', '.join(DTYPES)}")
        check_version(version)
        self.out, self.mode, self.ranks, self.dtype, self.version = Path(out), mode, ranks, dtype, version
        self.smoothing = capacity(mode, dtype)
        self.schemes = (mode.scheme,)
        self.options = {"trtllm": TrtllmOptions(mode.algo, dtype, ranks.tp, ranks.pp, version)}

    def held(self, model: Model) -> torch.dtype:
        return DTYPES[self.dtype]

    def check(self, source: Source) -> None:
        self.alpha = source.settings.alpha
        check_model(source.model, self.mode, self.ranks)
        check_dtype(source.model, self.mode, self.dtype)
        if needs_float16(source.model, self.mode):
            self.wider = "export with --no-plugins --dtype bfloat16"
        if self.mode.static:
            check_static(source, self.out)
        static = self.mode.static and self.mode.plugin
        for needed, why in ((static, "static activations"), (self.mode.cache.quantized, "an INT8 KV cache")):
            if needed:
                check_outputs(source, f"{self.out}: {why}")

    def nbytes(self, model: Model) -> int:
        stages = (self._plan_stage(model, stage) for stage in range(self.ranks.pp))
        return self.ranks.tp * sum(planned.nbytes for plan in stages for planned in plan.values())

    def begin(self, source: Source, work: Workspace) -> None:
        model = source.model
        self.model, self.work = model, work
        self.layers = self._layer_tensors(model)
        self.tensors = tuple(self.layers.planned())
        self.files = [
            SafetensorsFile(work.data(f"rank{rank}.safetensors"), plan)
            for stage in range(self.ranks.pp)
            for plan in [self._plan_stage(model, stage)]
            for rank in self.ranks.ranks(stage)
        ]
        if work.next_layer == 0:
            self._write_outer(first=True)

    def write_rows(self, layer: SmoothedLayer, rows: WeightRows) -> None:
        stage, local = self._place(layer.index)
        files = self._files(stage)
        for part in self.layers.of_rows(rows):
            files[part.rank].write_part(_full(local, part.name), part.content, part.row)

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        assert quantized is not None  # the scheme's weights are
        stage, local = self._place(layer.index)
        content = LayerContent(quantized, layer.output_absmax, layer.cache_scales[0] if layer.cache_scales else None)
        for tensor in self.tensors:
            if tensor.content is None:
                continue
            full, sharded = _full(local, tensor.name), tensor.content(content)
            for rank, file in enumerate(self._files(stage)):
                file.write(full, self._finite(full, sharded.of(rank, self.ranks.tp)))

    def end(self) -> None:
        self._write_outer(first=False)
        decoder = decoder_of(self.model, self.mode)
        content = config(self.model, decoder, self.mode, self.ranks, self.dtype, self.alpha)
        write_json(self.work.path("config.json"), content)
        write_card(self.model, self.work, TRTLLM)
        copy_sidecars(self.model.checkpoint.folder, self.work)

    def _write_outer(self, *, first: bool) -> None:
        """Write what lies before the layers, or what lies behind them (`exporters.turns` says why then)."""
        for outer in outer_tensors(self.model):
            if outer.first == first:
                outer.write(self.model, self._files(0 if first else self.ranks.pp - 1), self._cast)

    def _place(self, layer: int) -> tuple[int, int]:
        """The stage that holds a layer, and the layer's index within it."""
        layers = self.model.geometry.layers
        return self.ranks.stage(layer, layers), self.ranks.local(layer, layers)

    def _files(self, stage: int) -> list[SafetensorsFile]:
        return [self.files[rank] for rank in self.ranks.ranks(stage)]

    def _plan_stage(self, model: Model, stage: int) -> dict[str, Planned]:
        """The tensors of each rank of a stage, in the order on disk."""
        dtype, tp, layers = DTYPES[self.dtype], self.ranks.tp, model.geometry.layers

        def outside(first: bool) -> dict[str, Planned]:
            mine = [outer for outer in outer_tensors(model) if outer.first == first]
            return {outer.name: outer.plan(model, dtype, tp) for outer in mine}

        plan = outside(first=True) if stage == 0 else {}
        tensors = tuple(self._layer_tensors(model).planned())
        for local in range(layers // self.ranks.pp):
            plan |= {_full(local, tensor.name): Planned(tensor.shape, tensor.dtype) for tensor in tensors}
        return plan | (outside(first=False) if stage == self.ranks.pp - 1 else {})

    def _layer_tensors(self, model: Model) -> LayerTensors:
        return LayerTensors(model, self.mode, DTYPES[self.dtype], self.ranks.tp)

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        return self._finite(name, tensor.to(DTYPES[self.dtype]))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not is_finite(tensor):
            raise ContractError(f"{name} overflows {tensor.dtype}", do=f"lower alpha, or {self.wider}")
        return tensor


def _full(local: int, name: str) -> str:
    """Name of a layer's tensor in its stage's files. local: the layer's index in its stage. name: within the layer."""
    return f"transformer.layers.{local}.{name}"
