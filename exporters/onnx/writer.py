"""The ONNX export of a model: graph, weights streamed to external data, tokenizer and config beside them.

model.onnx         graph and small constants (and model.per-tensor.onnx, where two graphs were asked for)
model.onnx.data    weights: linears [in, out], int8 + float32 scales, or float
config.json, tokenizer files
smoothquant/tokenizer.json, smoothquant/smoothing.safetensors, smoothquant/manifest.json
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from act_scales.kept_tokenizer import KEPT, kept_form
from exporters.card import ONNX, write_card
from exporters.export import Source, check_outputs, check_static
from exporters.onnx.decoder import DecoderGraph
from exporters.onnx.external_data import FILE, Content, ExternalData, WeightContent
from exporters.onnx.form import Form
from exporters.onnx.graph import IN_PLACE_OPSET, OPSET
from exporters.turns import AFTER, BEFORE, Turn, in_turn
from smoothquant.artifacts.manifest import OnnxOptions
from smoothquant.artifacts.ports import graph_files
from smoothquant.capacity import FOLDED
from smoothquant.errors import ContractError
from smoothquant.files import write_bytes, write_text
from smoothquant.head import UNPLANNED, PlannedHead
from smoothquant.kv_cache import check_keys
from smoothquant.model import Model
from smoothquant.packages import require
from smoothquant.quantization import is_finite
from smoothquant.scheme import PER_TOKEN, Scheme
from smoothquant.settings import GRAPH_FACTS
from smoothquant.sidecars import copy_sidecars
from smoothquant.stream import QuantizedLayer, SmoothedLayer, WeightRows
from smoothquant.workspace import Workspace


class OnnxWriter:
    """Writes the ONNX export to the folder `out`.

    schemes: of its graph, or of two that share their weights and differ in their activations; `PER_TOKEN` by default. A
    float one makes the unquantized twin, an engine's reference. body, opset, capacity: see `Form`.
    """

    step = "export onnx"
    smoothing = FOLDED
    wider = "export with --dtype fp32, or for TensorRT with --dtype bf16"

    def __init__(
        self,
        out: str | Path,
        *schemes: Scheme,
        body: str = "fp32",
        opset: int | None = None,
        capacity: int | None = None,
    ) -> None:
        require("onnx")
        self.out, self.schemes = Path(out), schemes or (PER_TOKEN,)
        if opset is None:
            opset = OPSET if capacity is None else IN_PLACE_OPSET
        self.forms = {file: Form(scheme, body, opset, capacity) for file, scheme in graph_files(self.schemes).items()}
        self.options = {"onnx": OnnxOptions(body, opset, capacity)}

    def held(self, model: Model) -> torch.dtype:
        return next(iter(self.forms.values())).dtype

    def check(self, source: Source) -> None:
        if any(scheme.activations.static for scheme in self.schemes):
            check_static(source, self.out)
        if any(scheme.kv_cache.quantized for scheme in self.schemes):
            check_outputs(source, f"{self.out}: an INT8 KV cache")
            check_keys(source.model.family.norms, str(self.out))

    def nbytes(self, model: Model) -> int:
        return next(iter(self._decoders(model).values())).graph.data.nbytes

    def begin(self, source: Source, work: Workspace) -> None:
        self.model, self.work = source.model, work
        self.decoders = self._decoders(source.model, source.head(self))
        self.data = next(iter(self.decoders.values())).graph.data
        self.data.open(work.data(FILE))
        self.names = in_turn({name: place.content.layer for name, place in self.data.places.items()})
        self.weights: defaultdict[tuple[int, str], list[str]] = defaultdict(list)  # of all graphs, in float and in INT8
        for name, place in self.data.places.items():
            if isinstance(place.content, WeightContent):
                for role in place.content.starts:
                    self.weights[place.content.layer, role].append(name)
        if work.next_layer == 0:
            self._write(BEFORE)

    def write_rows(self, layer: SmoothedLayer, rows: WeightRows) -> None:
        for name in self.weights[layer.index, rows.role]:
            place = self.data.places[name]
            assert isinstance(place.content, WeightContent)  # by what `begin` has gathered
            column = place.content.starts[rows.role] + rows.rows.start
            self.data.write_columns(name, column, _rounded(name, place.content.rows(rows), place.dtype))

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        self._write(layer.index, layer, quantized)

    def end(self) -> None:
        self._write(AFTER)
        self._save_graphs()
        write_card(self.model, self.work, ONNX)
        copy_sidecars(self.model.checkpoint.folder, self.work, "config.json")
        if kept := kept_form(self.model.checkpoint.folder):
            write_text(self.work.path(KEPT), kept)

    def _write(self, turn: Turn, *layer: SmoothedLayer | QuantizedLayer | None) -> None:
        """Write the planned tensors whose turn it is: a layer's, but its weights, or what lies before or behind all
        layers."""
        for name in self.names[turn]:
            place = self.data.places[name]
            content = place.content
            if isinstance(content, Content):
                write = self.data.write_transposed if content.transposed else self.data.write_rows
                write(name, (_rounded(name, part, place.dtype) for part in content.parts(*layer)))

    def _decoders(self, model: Model, planned: PlannedHead = UNPLANNED) -> dict[str, DecoderGraph]:
        """file -> its graph; they share one file of weights."""
        data = ExternalData()
        return {file: DecoderGraph(model, form, data, planned) for file, form in self.forms.items()}

    def _save_graphs(self) -> None:
        for file, decoder in self.decoders.items():
            facts = {"family": self.model.family.name, **decoder.form.settings, "quantized": decoder.quantized_names}
            proto = decoder.graph.model({GRAPH_FACTS: json.dumps(facts)})
            write_bytes(self.work.path(file), proto.SerializeToString())


def _rounded(name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of a tensor in the planned dtype."""
    rounded = part.to(dtype)
    if not is_finite(rounded):
        raise ContractError(f"{name} overflows {rounded.dtype}", do="export with --dtype fp32, or lower alpha")
    return rounded
