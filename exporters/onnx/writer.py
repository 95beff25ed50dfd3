"""The ONNX export of a model: graph, weights streamed to external data, tokenizer and config beside them.

model.onnx         graph and small constants (and model.per-tensor.onnx, where both forms were asked for)
model.onnx.data    weights: linears [in, out], int8 + float32 scales, or float
config.json, tokenizer files; smoothquant/smoothing.safetensors, smoothquant/manifest.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporters.export import Source, check_outputs, check_static
from exporters.onnx.decoder import DecoderGraph
from exporters.onnx.external_data import FILE, ExternalData
from exporters.onnx.form import Form
from exporters.onnx.graph import OPSET
from exporters.sidecars import copy_tokenizer
from smoothquant.artifacts.manifest import OnnxOptions
from smoothquant.capacity import FOLDED
from smoothquant.errors import ContractError, UserError
from smoothquant.model import Model
from smoothquant.packages import require
from smoothquant.settings import GRAPH_FACTS
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
    smoothing = FOLDED

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
        self.out, self.activations, self.int8_cache = Path(out), activations, kv == "int8"
        self.weights: str | None = None if activations == "float" else "per-channel"
        static = {"per-tensor": tuple(kept)}
        self.forms = {
            file: Form(form, body, lm_head, kv, opset, static.get(form, ()))
            for file, form in GRAPHS[activations].items()
        }
        self.schemes = tuple(form.scheme for form in self.forms.values())
        self.options = {"onnx": OnnxOptions(body, opset)}

    def check(self, source: Source) -> None:
        if "per-tensor" in GRAPHS[self.activations].values():
            check_static(source, self.out)
        if self.int8_cache:
            check_outputs(source, f"{self.out}: an INT8 KV cache")
            if "keys" in source.model.family.norms:
                raise UserError(
                    f"{self.out}: an INT8 KV cache of keys that are normed over all heads at once",
                    expected="keys whose range calibration sees: linears' outputs, or normed head by head",
                    do="export with a float cache",
                )

    def nbytes(self, model: Model) -> int:
        return next(iter(self._decoders(model).values())).graph.data.nbytes

    def begin(self, model: Model, work: Workspace) -> None:
        self.model, self.work = model, work
        self.decoders = self._decoders(model)
        self.data = next(iter(self.decoders.values())).graph.data
        self.data.open(work.path(FILE))
        self.names: dict[int | None, list[str]] = {}  # tensors of each layer, and outside the layers
        for name, place in self.data.places.items():
            self.names.setdefault(place.content.layer, []).append(name)

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        self._write(layer.index, layer, quantized)

    def end(self) -> None:
        self._write(None)
        self._save_graphs()
        shutil.copyfile(self.model.checkpoint.folder / "config.json", self.work.path("config.json"))
        copy_tokenizer(self.model, self.work.folder)

    def _write(self, index: int | None, *layer: SmoothedLayer | QuantizedLayer | None) -> None:
        """Write the planned tensors of a layer, or of what lies outside of all."""
        for name in self.names.get(index, ()):
            place = self.data.places[name]
            write = self.data.write_transposed if place.content.transposed else self.data.write_rows
            write(name, (_rounded(name, part, place.dtype) for part in place.content.parts(*layer)))

    def _decoders(self, model: Model) -> dict[str, DecoderGraph]:
        """file -> its graph; they share one file of weights."""
        data = ExternalData()
        return {file: DecoderGraph(model, form, data) for file, form in self.forms.items()}

    def _save_graphs(self) -> None:
        for file, decoder in self.decoders.items():
            facts = {"family": self.model.family.name, **decoder.form.settings, "quantized": decoder.quantized_names}
            proto = decoder.graph.model({GRAPH_FACTS: json.dumps(facts)})
            self.work.path(file).write_bytes(proto.SerializeToString())


def _rounded(name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of a float tensor in the planned dtype; those of an int8 one as they are."""
    if not dtype.is_floating_point:
        return part
    rounded = part.to(dtype)
    if not rounded.isfinite().all():
        raise ContractError(f"{name} overflows {rounded.dtype}", do="export with --dtype fp32, or lower alpha")
    return rounded
