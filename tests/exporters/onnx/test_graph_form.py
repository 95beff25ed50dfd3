"""What the graphs are made of: what checkers accept and what engines compile to integer kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import onnx
import pytest
import torch

from builders.check.tensorrt_rtx import compile_onnx
from builders.nvidia.profiles import single_profile
from builders.onnxruntime.session import first_feed
from exporters.export import Source, export
from smoothquant.errors import ActScalesError, ContractError, MissingPackageError, UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.exporters.onnx.graphs import (
    FLOAT,
    FORMS,
    PER_TENSOR,
    PER_TOKEN,
    Runner,
    export_onnx,
    expose,
    products,
    source_of,
)
from tests.lacking import with_compiler
from tests.models import sample_ids
from tests.smoothquant.test_decoder import VARIANTS
from tests.writers import onnx_writer

NAMES = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]  # of a layer's products
NOT_IN_TENSORRT = {"DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["grouped heads", "biases", "tied embeddings"])
def test_form(form: str, variant: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    out = export_onnx(source_of(make_llama(**VARIANTS[variant])), tmp_path / "out", **FORMS[form])
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    model = onnx.load(out / "model.onnx")
    graph, stored = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}

    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert {node.domain for node in graph.node} == {""}
    assert not {node.op_type for node in graph.node} & NOT_IN_TENSORRT

    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    assert all(name in types for node in graph.node for name in node.output)
    assert onnx.TensorProto.UINT8 not in {*types.values(), *(tensor.data_type for tensor in stored.values())}

    zeros = {node.input[2] for node in graph.node if node.op_type.endswith("eLinear") and len(node.input) > 2}
    for name in zeros:
        assert stored[name].data_type == onnx.TensorProto.INT8
        assert onnx.numpy_helper.to_array(stored[name]) == 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = onnx.numpy_helper.to_array(stored[node.input[1]])
            assert scale.dtype == numpy.float32
            assert (scale > 0).all()

    weights = [t.name for t in stored.values() if t.data_type == onnx.TensorProto.INT8 and t.name not in zeros]
    for name in weights:
        [dequantize] = [node for node in graph.node if name in node.input]  # directly, and once
        assert dequantize.op_type == "DequantizeLinear"
        assert dequantize.input[0] == name
        assert [attribute.i for attribute in dequantize.attribute if attribute.name == "axis"] == [1]
        [product] = [node for node in graph.node if dequantize.output[0] in node.input]
        assert product.op_type == "MatMul"
        assert product.input[1] == dequantize.output[0]
        assert onnx.numpy_helper.to_array(stored[name]).min() >= -127
    expected = 0 if form.startswith("float") else 2 * 4 + ("int8 head" in form)
    assert len(weights) == len(products(graph)) == expected


def test_dead_rows_still_have_positive_scales(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """TensorRT refuses a scale of 0: a linear whose weights are all zero must not give one, nor NaN."""
    source = source_of(make_llama())
    read = source.model.read
    source.model.read = lambda name, rows=None: read(name, rows) * (0 if "layers.0.self_attn.v_proj" in name else 1)
    for form in (PER_TOKEN, PER_TENSOR):
        out = export_onnx(source, tmp_path / form["activations"], **form)
        for tensor in onnx.load(out / "model.onnx").graph.initializer:
            if "_scale" in tensor.name:
                assert (onnx.numpy_helper.to_array(tensor) > 0).all()
        assert Runner(out / "model.onnx").run(sample_ids())[0].isfinite().all()


def test_inputs_and_outputs(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    out = export_onnx(source_of(make_llama()), tmp_path / "out", body="fp16")
    session = Runner(out / "model.onnx").session
    cache, grown = ["batch", 2, "past", 16], ["batch", 2, "total", 16]
    assert {value.name: (value.type, value.shape) for value in session.get_inputs()} == {
        "input_ids": ("tensor(int64)", ["batch", "sequence"]),
        "attention_mask": ("tensor(int64)", ["batch", "total"]),
        "position_ids": ("tensor(int64)", ["batch", "sequence"]),
        **{f"past_key_values.{n}.{part}": ("tensor(float16)", cache) for n in (0, 1) for part in ("key", "value")},
    }
    assert {value.name: (value.type, value.shape) for value in session.get_outputs()} == {
        "logits": ("tensor(float)", ["batch", "kept", 288]),
        **{f"present.{n}.{part}": ("tensor(float16)", grown) for n in (0, 1) for part in ("key", "value")},
    }


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_logits_of_the_last_tokens_alone(
    form: Mapping[str, str], make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """An input that clients may leave away, and whose default TensorRT folds."""
    session = Runner(export_onnx(source_of(make_llama()), tmp_path / "out", **form) / "model.onnx").session
    [option] = session.get_overridable_initializers()
    assert (option.name, option.type, option.shape) == ("logits_to_keep", "tensor(int64)", [1])
    feed = first_feed(session, sample_ids().numpy())
    [whole] = session.run(["logits"], feed)
    for kept, first in ((0, 0), (1, -1), (3, -3), (10**6, 0)):
        [found] = session.run(["logits"], feed | {"logits_to_keep": numpy.array([kept])})
        numpy.testing.assert_allclose(found, whole[:, first:], rtol=1e-5, atol=1e-6)


def test_every_input_is_quantized_once(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """q, k, v share one quantization and one product, gate and up too: TensorRT and ONNX Runtime want them so."""
    out = export_onnx(source_of(make_llama()), tmp_path / "out", **PER_TOKEN)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 2 * 4
    names = [product.name.removeprefix("model.layers.1.") for product in products(graph) if ".1." in product.name]
    assert names == NAMES


def test_graph_says_what_it_is(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    out = export_onnx(source_of(make_llama()), tmp_path / "out", **PER_TENSOR, body="fp16", lm_head="int8")
    [entry] = onnx.load(out / "model.onnx", load_external_data=False).metadata_props
    assert entry.key == "smoothquant"
    assert json.loads(entry.value) == {
        "family": "llama",
        "activations": "per-tensor",
        "body": "fp16",
        "lm_head": "int8",
        "quantized": [
            *(f"model.layers.{layer}.{name}" for layer in range(2) for name in NAMES),
            "lm_head",
        ],
    }
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "smoothquant",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_twins_of_one_pass_are_those_of_two(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """A float and a W8A8 graph written side by side: the float one is not given integers."""
    source = source_of(make_llama())
    export(source, [onnx_writer(tmp_path / "w8a8"), onnx_writer(tmp_path / "float", **FLOAT)])
    alone = export_onnx(source, tmp_path / "alone", **FLOAT)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "float" / name).read_bytes() == (alone / name).read_bytes()


def test_static_scales_need_act_scales(llama: Model, tmp_path: Path) -> None:
    source = Source(llama, SmoothingSettings(groups="none"))
    with pytest.raises(ActScalesError, match="no activation scales; expected"):
        export_onnx(source, tmp_path / "static", **PER_TENSOR)
    assert not (tmp_path / "static").exists()
    Runner(export_onnx(source, tmp_path / "dynamic", **PER_TOKEN) / "model.onnx")


def test_what_overflows_float16_is_named(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of(make_llama())
    rows = source.model.rows
    source.model.rows = lambda name: (part * (1e8 if name == "lm_head.weight" else 1) for part in rows(name))
    with pytest.raises(ContractError, match=r"lm_head.weight overflows torch.float16; export with --dtype fp32"):
        export_onnx(source, tmp_path / "out", **FLOAT, body="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["activations", "body", "lm_head"])
def test_unknown_option(option: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'int4'; expected one of"):
        onnx_writer(tmp_path / "out", **{option: "int4"})


def test_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match="onnx is not installed; pip install"):
        onnx_writer(tmp_path / "out")


def test_a_mask_is_not_repeated_for_the_heads_of_a_group(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Half precision repeats bits, since TensorRT fuses its attention only so; all else repeats nothing."""
    folder, ids = make_llama(num_key_value_heads=1), sample_ids(2, 10)
    for form, kind, shape in ((FLOAT, "Add", (2, 1, 10, 10)), (FLOAT | {"body": "fp16"}, "Where", (2, 1, 4 * 10, 10))):
        out = export_onnx(source_of(folder), tmp_path / kind, **form)
        nodes = onnx.load(out / "model.onnx", load_external_data=False).graph.node
        producer = {name: node for node in nodes for name in node.output}
        masked = {
            producer[node.input[0]].op_type: producer[node.input[0]] for node in nodes if node.op_type == "Softmax"
        }
        mask = masked[kind].input[1 if kind == "Add" else 0]
        [found] = expose(out, [mask]).run(ids, outputs=[mask])
        assert found.shape == shape
        assert found.dtype == (torch.float32 if kind == "Add" else torch.bool)


@with_compiler
def test_attention_in_half_precision_is_one_kernel(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama(hidden_size=256, head_dim=64, num_hidden_layers=1)
    out = export_onnx(source_of(folder), tmp_path / "out", **FLOAT, body="fp16")
    found = compile_onnx(out / "model.onnx", single_profile(1, 64, 192))
    assert [layer.name for layer in found.layers if "mha" in layer.name]
