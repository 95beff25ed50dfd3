"""What tensorrt-edgellm-export makes of a folder: its ONNX graph, and the logits of that graph.

    OUT/llm/model.onnx              Q/DQ around every product; AttentionPlugin of the domain trt_edgellm
    OUT/llm/embedding.safetensors   the embedding, which the runtime looks tokens up in
    OUT/llm/config.json             by which the runtime makes the table of cosines and sines

ONNX's own reference evaluator computes the graph. The plugin is computed here from its attributes, as the docstring of
`attention_plugin` in tensorrt_edgellm/models/ops.py describes them: causal attention of grouped heads, the norms of
queries and keys before their rotation, a window of the newest keys.
"""

from __future__ import annotations

import json
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.servers.environments import EDGE_LLM

PAGE = 128  # tokens in a page of the KV cache
ROPE = ("rope_theta", "rope_type", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor")


class RefusedError(Exception):
    """The exporter's last line."""


class Product(NamedTuple):
    """A quantized product of the graph. weight: int8 (out, in). weight_scale, input_scale: names of initializers."""

    weight: np.ndarray
    weight_scale: str
    input_scale: str


def edge_llm_export(folder: Path, out: Path) -> Graph:
    """The graph of a folder. Raises RefusedError if the exporter makes none."""
    assert EDGE_LLM.python is not None
    command = [EDGE_LLM.python.with_name("tensorrt-edgellm-export"), folder, out]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if found.returncode:
        raise RefusedError(found.stderr.strip().splitlines()[-1])
    return Graph(out / "llm")


class Graph:
    """The graph in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, onnx.load(str(folder / "model.onnx"))
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.made_by = {name: node for node in self.model.graph.node for name in node.output}
        self.config = json.loads((folder / "config.json").read_text())
        [self.embedding] = load_file(folder / "embedding.safetensors").values()

    def value(self, name: str) -> np.ndarray:
        """The value of an initializer."""
        return numpy_helper.to_array(self.initializers[name])

    def scaled(self, name: str, factor: float) -> Graph:
        """The same graph with another scale: of every second row, since the norm of a head undoes a factor of all."""
        other, value = Graph(self.folder), self.value(name).copy()
        value.reshape(-1)[::2] *= np.float32(factor)
        other.initializers[name].CopyFrom(numpy_helper.from_array(value, name))
        return other

    @cached_property
    def products(self) -> list[Product]:
        """The quantized products, in the order of the graph."""
        found = []
        for node in self.model.graph.node:
            if node.op_type in ("MatMul", "Gemm"):
                x, weight = (self._dequantized(name) for name in node.input[:2])
                if weight is not None and self.value(weight.input[0]).dtype == np.int8:
                    assert x is not None, node.name  # no int8 matrix is multiplied by floats
                    quantize = self.made_by[x.input[0]]
                    assert (quantize.op_type, x.input[1]) == ("QuantizeLinear", quantize.input[1])
                    found.append(Product(self.value(weight.input[0]), weight.input[1], quantize.input[1]))
        return found

    def _dequantized(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that a value comes from; None if it comes from another node."""
        while (node := self.made_by.get(name)) is not None and node.op_type in ("Cast", "Transpose", "Reshape"):
            name = node.input[0]
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the graph, or is its embedding."""
        wanted = tensor.numpy()
        return any(
            found.dtype == wanted.dtype and any(np.array_equal(form, wanted) for form in (found, found.T))
            for found in (*self._values, self.embedding.numpy())
        )

    @cached_property
    def _values(self) -> list[np.ndarray]:
        return [self.value(name) for name in self.initializers]

    def logits(self, ids: Tensor, model: PreTrainedModel) -> Tensor:
        """Of whole sequences, float32 (batch, tokens, vocab). model: that of transformers, whose table of cosines and
        sines is taken, after its numbers were compared with those in the graph's config.json."""
        batch, tokens = ids.shape
        self._check_rope(model)
        cosines, sines = model.get_decoder().rotary_emb(torch.zeros(1, tokens, 1), torch.arange(tokens)[None])
        half = cosines.shape[-1] // 2
        table = torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=-1).repeat(batch, 1)
        lengths, count = np.full(batch, tokens, np.int32), batch * tokens
        cache = (2, 1, PAGE, self.config["num_key_value_heads"], self.config["head_dim"])
        inputs: dict[str, np.ndarray] = {
            "inputs_embeds": self.embedding[ids.flatten()].half().numpy(),
            "rope_rotary_cos_sin": table.float().numpy(),
            "positions": np.tile(np.arange(tokens, dtype=np.int32), batch),
            "query_start_offsets": np.arange(0, count + 1, tokens, dtype=np.int32),
            "query_lengths": lengths,
            "past_lengths": np.zeros(batch, np.int32),
            "attention_sequence_lengths": lengths,
            "state_indices": np.arange(batch, dtype=np.int32),
            "execution_phase_marker": np.zeros(2, np.int32),
            "context_sequence_count_carrier": np.zeros(batch, np.int32),
            "kv_page_table": np.zeros((batch, 2, 1), np.int32),
            "logits_indices": np.arange(count, dtype=np.int64),
        }
        for layer in range(self.config["num_hidden_layers"]):
            inputs[f"past_key_values_{layer}"] = np.zeros(cache, np.float16)
        wanted = {value.name for value in self.model.graph.input}
        assert wanted <= inputs.keys()
        evaluator = ReferenceEvaluator(self.model, new_ops=[AttentionPlugin])
        [found] = evaluator.run(["logits"], {name: inputs[name] for name in wanted})
        return torch.tensor(found).view(batch, tokens, -1)

    def _check_rope(self, model: PreTrainedModel) -> None:
        theirs, ours = self.config["rope_scaling"], model.config.rope_parameters
        told = {key: ours[key] for key in ROPE if ours.get(key) is not None}
        assert {key: theirs.get(key, self.config.get(key)) for key in told} == told


class AttentionPlugin(OpRun):
    """The plugin for sequences without a past."""

    op_domain = "trt_edgellm"

    def _run(self, qkv: np.ndarray, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, np.ndarray]:
        cache, lengths, table, past = inputs[:4]
        assert not past.any()
        heads, kv_heads, size = (attributes[name] for name in ("num_q_heads", "num_kv_heads", "head_size"))
        gains = [torch.tensor(gain).float() for gain in inputs[5:7]] if attributes["enable_qk_norm"] else []
        out, start = torch.zeros(len(qkv), heads, size), 0
        for length in lengths.tolist():
            rows = slice(start, start + length)
            start += length
            parts = torch.tensor(qkv[rows]).float().view(length, -1, size).split([heads, kv_heads, kv_heads], dim=1)
            queries, keys, values = parts
            if gains:
                queries, keys = (
                    x * torch.rsqrt(x.square().mean(-1, keepdim=True) + attributes["rms_norm_eps"]) * gain
                    for x, gain in zip((queries, keys), gains, strict=True)
                )
            cosines, sines = torch.tensor(table[rows])[:, None].chunk(2, dim=-1)
            queries, keys = (rotated(x, cosines, sines) for x in (queries, keys))
            keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * attributes["attention_scale"]
            ages = torch.arange(length)[:, None] - torch.arange(length)
            window = attributes["sliding_window_size"]
            hidden = (ages < 0) | ((ages >= window) if window > 0 else (ages < 0))
            out[rows] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
        return out.half().numpy(), cache


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the first channels of every head; cosines, sines: (tokens, 1, half of them)."""
    half = cosines.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], dim=-1)
