"""Exported graphs through others' eyes: onnx reads and edits them, onnxruntime runs them, with an engine's settings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import onnx
import onnxruntime
import torch

from builders.onnxruntime.session import CACHES
from builders.onnxruntime.session import SETTINGS as ENGINE_SETTINGS
from exporters.export import Source, export
from smoothquant.machine import subnormals_as_zero
from smoothquant.settings import SmoothingSettings
from tests.models import hooked_absmax, open_llama, sample_ids
from tests.writers import onnx_writer

SETTINGS = SmoothingSettings(0.5)
FLOAT, PER_TOKEN, PER_TENSOR = ({"activations": form} for form in ("float", "per-token", "per-tensor"))
FORMS = {
    "float": FLOAT,
    "float, fp16": FLOAT | {"body": "fp16"},
    "per token": PER_TOKEN,
    "per token, int8 head": PER_TOKEN | {"lm_head": "int8"},
    "per token, fp16, int8 head": PER_TOKEN | {"body": "fp16", "lm_head": "int8"},
    "per tensor": PER_TENSOR,
    "per tensor, int8 head": PER_TENSOR | {"lm_head": "int8"},
    "per tensor, fp16": PER_TENSOR | {"body": "fp16"},
}
W8A8_FORMS = [name for name in FORMS if not name.startswith("float")]


def source_of(folder: Path) -> Source:
    return Source(open_llama(folder), SETTINGS, hooked_absmax(folder, sample_ids()), {"model": "m", "act_scales": "a"})


def export_onnx(source: Source, out: Path, **options: str) -> Path:
    export(source, [onnx_writer(out, **options)])
    return out


class Runner:
    """A graph file in onnxruntime. `fused`: operators after its optimizations."""

    def __init__(self, path: Path, settings: Mapping[str, str] = ENGINE_SETTINGS) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        optimized = path.with_suffix(".optimized.onnx")
        options.optimized_model_filepath = str(optimized)
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        with subnormals_as_zero():
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.fused = Counter(node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node)
        self.past: dict[str, numpy.ndarray] = {}

    def run(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        outputs: Sequence[str] = ("logits",),
    ) -> list[torch.Tensor]:
        """Run on ids (batch, tokens), behind what `past` holds. mask: (batch, past + tokens)."""
        batch, tokens = ids.shape
        past = {value.name: self._past(value, batch) for value in self.session.get_inputs() if "past" in value.name}
        before = next(iter(past.values())).shape[2]
        mask = torch.ones(batch, before + tokens, dtype=torch.int64) if mask is None else mask
        if positions is None:
            positions = torch.arange(before, before + tokens).expand(batch, tokens)
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **past}
        present = [value.name for value in self.session.get_outputs() if value.name.startswith("present.")]
        with subnormals_as_zero():
            found = self.session.run([*outputs, *present], feed)
        kept = found[len(outputs) :]
        self.past = {n.replace("present", "past_key_values"): v for n, v in zip(present, kept, strict=True)}
        return [torch.from_numpy(value) for value in found[: len(outputs)]]

    def _past(self, value: onnxruntime.NodeArg, batch: int) -> numpy.ndarray:
        _, kv_heads, _, head_dim = value.shape
        return self.past.get(value.name, numpy.zeros((batch, kv_heads, 0, head_dim), CACHES[value.type]))


@dataclass(frozen=True)
class Product:
    """One quantized matrix product. name: module; the rest: names of values in the graph.

    x: float32, before the token normalisation and QuantizeLinear; integers: QuantizeLinear's output; y: float32, with
    the token's maximum multiplied in; result: after the cast to the body's dtype and the bias, y itself without these.
    rows: indices of the tokens of x that an expert is given, None for all.
    """

    name: str
    per_token: bool
    x: str
    integers: str
    y: str
    result: str
    rows: str | None = None


def products(graph: onnx.GraphProto) -> list[Product]:
    """Every MatMul with an int8 initializer, found by walking the graph from it."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)

    def after(value: str, kind: str) -> onnx.NodeProto | None:
        found = readers[value]
        return found[0] if len(found) == 1 and found[0].op_type == kind else None

    result = []
    for node in graph.node:
        weight = producer.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        quantize = producer[producer[node.input[0]].input[0]]
        assert quantize.op_type == "QuantizeLinear"
        x, y, rows = quantize.input[0], node.output[0], None
        if producer[x].op_type == "Gather" and producer[x].input[0] in producer:  # an expert's tokens, no embedding
            x, rows = producer[x].input
        divide = producer[x]
        per_token = divide.op_type == "Div" and producer[divide.input[1]].op_type == "Max"
        if per_token:
            multiply = after(y, "Mul")
            assert multiply
            amax = {producer[value].input[0] if rows else value for value in multiply.input}
            assert divide.input[1] in amax
            x, y = divide.input[0], multiply.output[0]
        cast = after(y, "Cast")
        last = cast.output[0] if cast else y
        bias = after(last, "Add")
        if bias and bias.input[1] in stored:
            last = bias.output[0]
        name = weight.input[0].removesuffix(".weight_int8")
        result.append(Product(name, per_token, x, quantize.output[0], y, last, rows))
    return result


def load_graph(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def expose(folder: Path, values: Sequence[str], settings: Mapping[str, str] = ENGINE_SETTINGS) -> Runner:
    """Run a copy of the graph that also puts out these values."""
    model = load_graph(folder)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(values) if name not in known)
    path = folder / "exposed.onnx"
    onnx.save(model, path)
    return Runner(path, settings)
