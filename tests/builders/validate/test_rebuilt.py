"""Whatever an export was asked for, the layers that validation measures are those in its files, bit for bit.

The files are read by others' means: safetensors, onnx, and the rules of TensorRT-LLM's format for putting ranks
together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.numpy_helper import to_array
from safetensors.torch import load_file
from torch import Tensor

from builders.validate import read_scheme
from builders.validate.layers import W8A8Stream
from builders.validate.scheme import EngineScheme
from exporters.export import Source, Writer, export
from exporters.huggingface import W8A8Writer
from exporters.onnx import OnnxWriter
from exporters.trtllm import MODES, Mode, Ranks, TrtllmWriter
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.steps import DEFAULT, STEPS, BorrowRanges, Step
from tests.exporters.trtllm.checkpoints import make, ranks
from tests.exporters.trtllm.test_sharding import LAYER, reassembled
from tests.steps import KNOWN, ClipRows, Shrink

KEPT = ("model.layers.1.self_attn.o_proj",)
MERGED = {  # linears of an ONNX graph -> ours that it consists of, of a Llama and of a Mixtral
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
}
TRTLLM = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}

Stored = dict[str, Tensor]  # "weight" (out, in) and, as far as the format has them bare, its scales
Found = dict[tuple[str, ...], Stored]  # by the linears whose rows follow one another


@dataclass(frozen=True)
class Form:
    """A writer of a folder, and who reads it."""

    writer: Callable[[Path], Writer]
    read: Callable[[Path, Model], Found]
    layouts: tuple[str, ...] = ("llama", "mixtral")


def read_w8a8(folder: Path, model: Model) -> Found:
    tensors, found = load_file(folder / "model.safetensors"), {}
    for name, _ in model.linears():
        kinds = (kind for kind in ("weight", "weight_scale", "input_scale") if f"{name}.{kind}" in tensors)
        found[(name,)] = {kind: tensors[f"{name}.{kind}"] for kind in kinds}
    return found


def read_onnx(folder: Path, model: Model) -> Found:
    initializers = onnx.load(folder / "model.onnx").graph.initializer
    stored = {each.name: torch.from_numpy(to_array(each).copy()) for each in initializers}
    known, found = {name for name, _ in model.linears()}, {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        candidates = (module, *(f"{parent}.{part}" for part in MERGED.get(last, ())))
        names = tuple(candidate for candidate in candidates if candidate in known)
        if names and kind in ("weight", "weight_int8"):
            scales = {kind: stored.get(f"{module}.{kind}") for kind in ("weight_scale", "input_scale")}
            found[names] = {"weight": tensor.t()} | {kind: scale for kind, scale in scales.items() if scale is not None}
        elif kind == "cache_scale":
            found[(module,)] = {"cache_scale": tensor}
    return found


def read_trtllm(folder: Path, model: Model) -> Found:
    tensors, found = reassembled(ranks(folder), model.geometry), {}
    for layer in range(model.geometry.layers):
        for ours, names in TRTLLM.items():
            own = {key.removeprefix(f"{LAYER}{layer}.{ours}."): tensor for key, tensor in tensors.items()}
            stored = {"weight": own["weight"]}
            if "weights_scaling_factor" in own:
                stored |= {
                    "weight_scale": own["weights_scaling_factor"],
                    "input_scale": own["activation_scaling_factor"],
                }
            elif "act_scale" not in own:  # dynamic: no static scale is multiplied in
                stored["weight_scale"] = own["per_channel_scale"].expand(1, len(own["weight"]))
            found[tuple(f"model.layers.{layer}.{name}" for name in names)] = stored
        cache = tensors.get(f"{LAYER}{layer}.attention.kv_cache_scaling_factor")
        if cache is not None:
            found |= {(f"model.layers.{layer}.{part}",): {"cache_scale": cache} for part in ("key", "value")}
    return found


def trtllm(mode: Mode, tp: int, kv: str) -> Form:
    return Form(lambda out: TrtllmWriter(out, mode, Ranks(tp), kv=kv), read_trtllm, ("llama",))


FORMS: Mapping[str, Form] = {
    "w8a8, per token": Form(lambda out: W8A8Writer(out), read_w8a8),
    "w8a8, static": Form(lambda out: W8A8Writer(out, "per-tensor", kept=KEPT), read_w8a8),
    "onnx, per token": Form(lambda out: OnnxWriter(out, kv="int8"), read_onnx),
    "onnx, static": Form(lambda out: OnnxWriter(out, "per-tensor", kept=KEPT), read_onnx),
    **{
        f"{mode.algo}, --tp {tp} --kv {kv}": trtllm(mode, tp, kv)
        for mode in MODES
        for tp, kv in ((1, "float"), (2, "int8"))
    },
}
ANY_STEP: st.SearchStrategy[Step] = st.sampled_from((BorrowRanges(), ClipRows(0.9), ClipRows(0.6), Shrink()))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in ("llama", "mixtral")}


def measured(scheme: EngineScheme, model: Model) -> dict[str, Stored]:
    """The layers as validation runs them."""
    found: dict[str, Stored] = {}
    stream = W8A8Stream(model, scheme)
    for index in range(model.geometry.layers):
        layer = next(iter(stream.enter(float_layer(model, index)).values()))
        for role in model.quantized_roles:
            stored = {"weight": layer.weights[role], "weight_scale": layer.weight_scales[role]}
            if role in layer.float_weights:
                stored = {"weight": layer.float_weights[role]}
            elif role in layer.input_scales:
                stored["input_scale"] = layer.input_scales[role]
            found[model.linear(index, role)] = stored
        for part, scale in zip(("key", "value"), layer.cache_scales or (), strict=False):
            found[model.family.module(index, part)] = {"cache_scale": scale}
    return found


def differences(found: Found, rebuilt: Mapping[str, Stored]) -> list[str]:
    """What is not, bit for bit, in both. Linears of one matrix share an input scale."""
    different = []
    for names, stored in found.items():
        for kind, tensor in stored.items():
            parts = [rebuilt[name].get(kind) for name in names]
            same = None not in parts and (
                all(part.equal(tensor.flatten()[0]) for part in parts)
                if kind in ("input_scale", "cache_scale")
                else torch.cat(parts).flatten().to(tensor.dtype).equal(tensor.flatten())
            )
            different += [] if same else [f"{names} {kind}"]
    return different


@settings(max_examples=40)
@given(st.sampled_from(sorted(FORMS)), st.data(), st.floats(0.1, 0.9), st.lists(ANY_STEP, max_size=3))
def test_what_is_measured_is_what_is_stored(
    sources: dict[str, Source], name: str, data: st.DataObject, alpha: float, steps: list[Step]
) -> None:
    form = FORMS[name]
    source = sources[data.draw(st.sampled_from(form.layouts))]
    with tempfile.TemporaryDirectory() as scratch, patch.dict(STEPS, KNOWN):
        out = Path(scratch) / "out"
        model, writer = source.model, form.writer(out)
        groups = data.draw(st.sampled_from(writer.smoothing.groups))
        smoothing = writer.smoothing.settings(model, alpha, groups)
        export(replace(source, settings=smoothing, steps=tuple(steps)), [writer])
        scheme, found = read_scheme(out), form.read(out, model)
        assert (scheme.settings, scheme.steps) == (smoothing, tuple(steps))
        assert scheme.ranks == (writer.ranks.tp if isinstance(writer, TrtllmWriter) else 1)
        rebuilt = measured(scheme, model)
        assert {name for names in found for name in names} == rebuilt.keys()
        assert differences(found, rebuilt) == []
        # the controls: read without the steps that change weights, or without the scales that were folded
        if any(isinstance(step, ClipRows) for step in steps):
            assert differences(found, measured(replace(scheme, steps=DEFAULT), model))
        if groups != "none":
            plain = replace(scheme.smoothing, smoothing_scale={})
            assert differences(found, measured(replace(scheme, smoothing=plain), model))
