"""The ONNX export of a model: graph, weights streamed to external data, tokenizer and config beside them.

model.onnx         graph and small constants (and model.per-tensor.onnx, where both forms were asked for)
model.onnx.data    weights: linears [in, out], int8 + float32 scales, or float
config.json, tokenizer files; smoothquant/smoothing.safetensors, smoothquant/manifest.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporters.export import Source, check_folded, check_outputs, check_static
from exporters.onnx.decoder import DecoderGraph
from exporters.onnx.external_data import FILE, ExternalData
from exporters.onnx.form import Form
from exporters.onnx.graph import OPSET
from exporters.onnx.products import Merged
from exporters.sidecars import copy_tokenizer
from smoothquant.errors import ContractError, UserError
from smoothquant.family import ROUTER
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.packages import require
from smoothquant.quantization import quantize_weight
from smoothquant.settings import CACHE_SCALE, CACHED, GRAPH_FACTS
from smoothquant.stream import QuantizedLayer, SmoothedLayer
from smoothquant.workspace import Workspace

GRAPHS = {  # option -> file -> form of the activations
    "per-token": {"model.onnx": "per-token"},
    "per-tensor": {"model.onnx": "per-tensor"},
    "both": {"model.onnx": "per-token", "model.per-tensor.onnx": "per-tensor"},
    "float": {"model.onnx": "float"},
}


class OnnxWriter:
    """Writes the ONNX export to the folder `out`.

    activations: "per-token", "per-tensor", "both" (two graphs that share their weights), or "float": the unquantized
    twin, an engine's reference.
    kept: module names of linears to leave in float where scales are static (`smoothquant.static`).
    body, lm_head, opset, kv: see `Form`.
    """

    step = "export onnx"

    def __init__(
        self,
        out: str | Path,
        activations: str = "per-token",
        body: str = "fp32",
        lm_head: str = "float",
        kept: Sequence[str] = (),
        opset: int = OPSET,
        kv: str = "float",
    ) -> None:
        if activations not in GRAPHS:
            raise UserError(f"ONNX export: {activations!r}", expected=f"one of {', '.join(GRAPHS)}")
        require("onnx")
        self.out, self.activations = Path(out), activations
        self.weights: str | None = None if activations == "float" else "per-channel"
        static = {"per-tensor": tuple(kept)}
        self.forms = {
            file: Form(form, body, lm_head, kv, opset, static.get(form, ()))
            for file, form in GRAPHS[activations].items()
        }
        told = [form.settings for form in self.forms.values()]
        self.settings: Mapping = {**told[0], **told[-1], "activations": activations}

    def check(self, source: Source) -> None:
        check_folded(source, self.out)
        if "per-tensor" in GRAPHS[self.activations].values():
            check_static(source, self.out)
        if self.settings.get("kv_cache"):
            check_outputs(source, f"{self.out}: an INT8 KV cache")

    def nbytes(self, model: Model) -> int:
        return next(iter(self._decoders(model).values())).graph.data.nbytes

    def begin(self, model: Model, work: Workspace) -> None:
        self.model, self.work = model, work
        self.decoders = self._decoders(model)
        self.data = next(iter(self.decoders.values())).graph.data
        self.data.open(work.path(FILE))

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        for role, norm in layer.norms.items():
            self._write_norm(self.model.norm(layer.index, role), norm)
        if ROUTER in layer.source.weights:
            name = f"{self.model.linear(layer.index, ROUTER)}.weight"
            self.data.write_transposed(name, [self._to_planned(name, layer.weight(ROUTER))])
        if self.settings.get("kv_cache"):
            self._write_cache_scales(layer)
        graphs = (decoder.products.merged[layer.index] for decoder in self.decoders.values())
        for merged in dict.fromkeys(merged for graph in graphs for merged in graph):
            if quantized is None or not merged.quantized:
                weight = f"{merged.name}.weight"
                parts = (self._to_planned(weight, layer.weight(role)) for role in merged.roles)
                self.data.write_transposed(weight, parts)
            else:
                linears = [quantized.linears[role] for role in merged.roles]
                self.data.write_transposed(f"{merged.name}.weight_int8", (linear.weight for linear in linears))
                self.data.write_rows(f"{merged.name}.weight_scale", (linear.weight_scale for linear in linears))
                if f"{merged.name}.input_scale" in self.data.places:
                    assert linears[0].input_scale is not None  # `export` has seen to it
                    self.data.write(f"{merged.name}.input_scale", linears[0].input_scale)  # one input, one scale
            if f"{merged.name}.bias" in self.data.places:
                self.data.write_rows(f"{merged.name}.bias", self._biases(layer, merged))

    def end(self) -> None:
        model, family = self.model, self.model.family
        for name in filter(None, (family.embedding, family.positions)):
            table = f"{name}.weight"
            self.data.write_rows(table, (self._to_planned(table, rows) for rows in model.rows(table)))
        for name in filter(None, (family.embedding_norm, family.final_norm)):
            self._write_norm(name, model.norm_at(name))
        for name in filter(None, (family.project_in, family.project_out)):
            self._write_transposed(f"{name}.weight", f"{name}.weight")
        head = f"{family.lm_head}.weight"
        if f"{head}_int8" in self.data.places:
            self._write_int8_head()
        elif head in self.data.places:
            self._write_transposed(head, model.lm_head)
        self._save_graphs()
        shutil.copyfile(model.checkpoint.folder / "config.json", self.work.path("config.json"))
        copy_tokenizer(model, self.work.folder)

    def _decoders(self, model: Model) -> dict[str, DecoderGraph]:
        """file -> its graph; they share one file of weights."""
        data = ExternalData()
        return {file: DecoderGraph(model, form, data) for file, form in self.forms.items()}

    def _save_graphs(self) -> None:
        for file, decoder in self.decoders.items():
            facts = {"family": self.model.family.name, **decoder.form.settings, "quantized": decoder.quantized_names}
            proto = decoder.graph.model({GRAPH_FACTS: json.dumps(facts)})
            self.work.path(file).write_bytes(proto.SerializeToString())

    def _write_cache_scales(self, layer: SmoothedLayer) -> None:
        assert layer.cache_scales is not None  # `check` has seen to it
        for part, scale in zip(CACHED, layer.cache_scales, strict=True):
            self.data.write(self.model.family.module(layer.index, part) + CACHE_SCALE, scale)

    def _write_int8_head(self) -> None:
        scales: list[Tensor] = []

        def quantized() -> Iterator[Tensor]:
            for rows in self.model.rows(self.model.lm_head):
                weight, scale = quantize_weight(rows)
                scales.append(scale)
                yield weight

        name = self.model.family.lm_head
        self.data.write_transposed(f"{name}.weight_int8", quantized())
        self.data.write(f"{name}.weight_scale", torch.cat(scales))

    def _write_norm(self, name: str, norm: Norm) -> None:
        for part, tensor in (("weight", norm.gain), ("bias", norm.bias)):
            if tensor is not None:
                self.data.write(f"{name}.{part}", self._to_planned(f"{name}.{part}", tensor))

    def _write_transposed(self, name: str, source: str) -> None:
        """name: of the planned matrix (in, out); source: of the tensor (out, in) in the checkpoint."""
        self.data.write_transposed(name, (self._to_planned(name, rows) for rows in self.model.rows(source)))

    def _biases(self, layer: SmoothedLayer, merged: Merged) -> Iterator[Tensor]:
        for role in merged.roles:
            bias = layer.bias(role)
            zeros = torch.zeros(self.model.family.shape(role, self.model.geometry)[0])
            yield self._to_planned(f"{merged.name}.bias", zeros if bias is None else bias)

    def _to_planned(self, name: str, tensor: Tensor) -> Tensor:
        rounded = tensor.to(self.data.places[name].dtype)
        if not rounded.isfinite().all():
            raise ContractError(f"{name} overflows {rounded.dtype}", do="export with --dtype fp32, or lower alpha")
        return rounded
