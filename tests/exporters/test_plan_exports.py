"""An export by a plan holds the plan's integers, scales and biases, whoever reads it; another target is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from safetensors.torch import load_file
from torch import Tensor

from builders.validate import read_scheme
from exporters.export import Source, Writer, export
from exporters.huggingface import ModelOptWriter, SmoothedWriter, W8A8Writer
from exporters.onnx import OnnxWriter
from exporters.trtllm import MODES, Mode, Ranks, TrtllmWriter
from smoothquant.errors import OutputError, UserError
from smoothquant.int8_checkpoint import BIAS, WEIGHT, WEIGHT_SCALE
from smoothquant.layers import float_layer
from smoothquant.outputs import load_manifest
from smoothquant.plan import layer_file, read_plan
from smoothquant.scheme import PER_TENSOR, PER_TOKEN, SHARED_CACHES, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.builders.validate.test_rebuilt import differences, measured, read_onnx, read_trtllm, read_w8a8
from tests.families.case import Case
from tests.plans import LAYOUTS, makers, plan_of, source_with_plan, write_plan
from tests.writers import onnx_writer

ROUNDED = (WEIGHT, WEIGHT_SCALE, BIAS)
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    return makers(tmp_path_factory)


def rounded(source: Source) -> dict[str, Tensor]:
    """What a plan's files hold of rounded linears, by the names that a Hugging Face checkpoint has."""
    found: dict[str, Tensor] = {}
    for index in range(source.model.geometry.layers):
        found |= load_file(plan_of(source).folder / layer_file(index))
    return {name: tensor for name, tensor in found.items() if name.endswith(ROUNDED)}


def initializers_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of an ONNX graph by name."""
    initializers = onnx.load(folder / "model.onnx").graph.initializer
    return {each.name: torch.from_numpy(to_array(each).copy()) for each in initializers}


def assert_held(stored: Mapping[str, Tensor], source: Source) -> None:
    """A Hugging Face checkpoint holds the plan's linears. Scales may have one column."""
    for name, tensor in rounded(source).items():
        assert stored[name].flatten().equal(tensor.flatten().to(stored[name].dtype)), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_w8a8(name: str, planned: Callable[[str], Source], tmp_path: Path) -> None:
    source = planned(name)
    export(source, [W8A8Writer(tmp_path / "out")])
    assert_held(load_file(tmp_path / "out/model.safetensors"), source)


def test_static_with_linears_in_float(tmp_path: Path) -> None:
    """Those have the original's weights and biases, smoothed: no correction is theirs."""
    case = Case("llama-biased", tmp_path)
    source = source_with_plan(case, replace(PER_TENSOR, float_linears=(DOWN,)))
    scheme = plan_of(source).facts.scheme
    assert DOWN + WEIGHT not in rounded(source)
    export(source, [W8A8Writer(tmp_path / "w8a8", scheme), ModelOptWriter(tmp_path / "modelopt", scheme)])
    for form in ("w8a8", "modelopt"):
        stored = load_file(tmp_path / form / "model.safetensors")
        assert_held(stored, source)
        assert stored[DOWN + WEIGHT].is_floating_point()
        if form == "w8a8":  # in float16 it is rounded
            assert stored[DOWN + BIAS].equal(float_layer(source.model, 1).biases["down"])
    export(source, [onnx_writer(tmp_path / "onnx", "per-tensor", kept=(DOWN,))])
    initializers = initializers_of(tmp_path / "onnx")
    assert initializers[DOWN + BIAS].equal(float_layer(source.model, 1).biases["down"])


def test_a_float_linear_that_was_rounded_stays_the_models(tmp_path: Path) -> None:
    """A search may round a linear before it leaves it in float: then neither its integers nor its bias count."""
    case = Case("llama-biased", tmp_path)
    folder = write_plan(case.model, case.act_scales, tmp_path / "plan", scheme=PER_TOKEN)
    kept = replace(PER_TOKEN, float_linears=(DOWN,))
    plan = read_plan(folder)
    plan = replace(plan, facts=replace(plan.facts, scheme=kept)).for_model(case.model)
    source = replace(case.source, settings=plan.facts.smoothing, plan=plan)
    assert DOWN + BIAS in rounded(source)
    export(source, [W8A8Writer(tmp_path / "w8a8", kept), OnnxWriter(tmp_path / "onnx", kept)])
    for stored in (load_file(tmp_path / "w8a8/model.safetensors"), initializers_of(tmp_path / "onnx")):
        assert stored[DOWN + BIAS].equal(float_layer(case.model, 1).biases["down"])
    layers = smoothed_layers(case.model, source.input_absmax, source.settings, plan=plan)
    last = [quantize_layer(layer, kept) for layer in layers][1]
    assert last.float_biases["down"].equal(float_layer(case.model, 1).biases["down"])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_onnx(name: str, planned: Callable[[str], Source], tmp_path: Path) -> None:
    source = planned(name)
    export(source, [onnx_writer(tmp_path / "out")])
    scheme = read_scheme(tmp_path / "out", [plan_of(source)])
    found, rebuilt = read_onnx(tmp_path / "out", source.model), measured(scheme, source.model)
    assert {linear for names in found for linear in names} == rebuilt.keys()
    assert differences(found, rebuilt) == []
    assert differences(found, measured(replace(scheme, plan=None), source.model))  # the control
    held = rounded(source)
    for names, stored in found.items():
        assert stored["weight"].equal(torch.cat([held[linear + WEIGHT] for linear in names]))


@pytest.mark.parametrize("name", ["qwen2", "opt", "bloom"])
def test_onnx_biases(name: str, planned: Callable[[str], Source], tmp_path: Path) -> None:
    source = planned(name)
    export(source, [onnx_writer(tmp_path / "out")])
    stored, model, compared = initializers_of(tmp_path / "out"), source.model, 0
    for index in range(model.geometry.layers):
        held = plan_of(source).layer(model, index).rounded
        for roles in model.side_by_side:
            biases = [bias for role in roles if (bias := held[role].bias) is not None]
            if biases:
                compared += any(tensor.equal(torch.cat(biases)) for tensor in stored.values())
    assert compared > 0
    assert compared == len([each for each in stored if each.endswith(BIAS) and "norm" not in each and "ln" not in each])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.plugin and not mode.whole], ids=lambda mode: mode.algo)
@pytest.mark.parametrize("tp", [1, 2])
def test_trtllm(mode: Mode, tp: int, tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    source = source_with_plan(case, mode.scheme)
    export(source, [TrtllmWriter(tmp_path / "out", mode, Ranks(tp))])
    scheme = read_scheme(tmp_path / "out", [plan_of(source)])
    found = read_trtllm(tmp_path / "out", source.model)
    assert differences(found, measured(scheme, source.model)) == []
    assert differences(found, measured(replace(scheme, plan=None), source.model))  # the control
    held = rounded(source)
    for names, stored in found.items():
        assert stored["weight"].equal(torch.cat([held[linear + WEIGHT] for linear in names]))


def test_the_smoothed_float_model(planned: Callable[[str], Source], tmp_path: Path) -> None:
    """Has the plan's scales alone, and the original's biases."""
    source = planned("qwen2")
    export(source, [SmoothedWriter(tmp_path / "out")])
    stored, held = load_file(tmp_path / "out/model.safetensors"), rounded(source)
    layers = smoothed_layers(source.model, source.input_absmax, source.settings, plan=source.plan)
    for layer in layers:
        for role in source.model.quantized_roles:
            name = source.model.linear(layer.index, role)
            assert stored[name + WEIGHT].equal(layer.weight(role).to(stored[name + WEIGHT].dtype))
            if name + BIAS in held:
                assert not stored[name + BIAS].equal(held[name + BIAS].to(stored[name + BIAS].dtype))
    assert read_scheme(tmp_path / "out").plan is None  # nothing of it is rounded: no plan is needed


def test_another_plan_is_another_export(tmp_path: Path) -> None:
    case, out = Case("llama", tmp_path), tmp_path / "out"
    first = source_with_plan(case)
    export(first, [W8A8Writer(out)])
    manifest = load_manifest(out)
    assert manifest.origin.plan == plan_of(first).fingerprint
    assert manifest.origin.words()["plan"] == plan_of(first).fingerprint
    assert manifest.origin.words()["smoothing"] == {"groups": "default"}
    assert f"| fingerprint of the plan | {plan_of(first).fingerprint} |" in (out / "README.md").read_text()
    export(first, [W8A8Writer(out)])  # left alone
    other = read_plan(write_plan(case.model, case.act_scales, tmp_path / "other", seed=1)).for_model(case.model)
    with pytest.raises(OutputError, match="was not made by this command with these inputs"):
        export(replace(first, plan=other), [W8A8Writer(out)])
    with pytest.raises(OutputError, match="was not made by this command with these inputs"):
        export(replace(first, plan=None), [W8A8Writer(out)])


PER_TENSOR_WEIGHTS = MODES[1]
REFUSED: Mapping[str, tuple[Scheme, Callable[[Path], Writer], str]] = {
    "activations": (
        PER_TENSOR,
        W8A8Writer,
        "per-token activations, by a plan for another target .*; expected per-tensor activations, as the plan has it",
    ),
    "both": (PER_TOKEN, lambda out: onnx_writer(out, "both"), "per-tensor activations, by a plan for another target"),
    "weights": (
        PER_TOKEN,
        lambda out: TrtllmWriter(out, PER_TENSOR_WEIGHTS),
        "per-tensor weights, by a plan for another target .*; expected per-channel weights",
    ),
    "cache": (PER_TOKEN, lambda out: onnx_writer(out, kv="int8"), "a KV cache in int8, per-tensor, by a plan for ano"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_target(what: str, tmp_path: Path) -> None:
    scheme, writer, said = REFUSED[what]
    source = source_with_plan(Case("llama", tmp_path), scheme)
    with pytest.raises(UserError, match=said):
        export(source, [writer(tmp_path / "out")])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_groups_that_a_format_does_not_hold(tmp_path: Path) -> None:
    """As without a plan: what is folded must be what the engine's format can hold."""
    case = Case("llama", tmp_path)
    source = source_with_plan(case, PER_TENSOR)
    with pytest.raises(UserError, match="smoothing groups 'default' with W8A8_SQ_PER_CHANNEL"):
        export(source, [TrtllmWriter(tmp_path / "out", MODES[4])])
    cached = replace(MODES[0], scheme=replace(PER_TOKEN, kv_cache=SHARED_CACHES["int8"]))
    with pytest.raises(UserError, match="a KV cache 'none' with"):
        export(source, [TrtllmWriter(tmp_path / "out", cached)])
    folder = write_plan(case.model, case.act_scales, tmp_path / "run-time", settings=SmoothingSettings(0.5, "run-time"))
    plan = read_plan(folder).for_model(case.model)
    with pytest.raises(UserError, match="smoothing groups 'run-time' with engines that smooth nothing themselves"):
        export(replace(source, settings=plan.facts.smoothing, plan=plan), [W8A8Writer(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_int8_cache_has_the_ranges_of_the_act_scales(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    cached = replace(PER_TOKEN, kv_cache=onnx_writer(tmp_path, kv="int8").schemes[0].kv_cache)
    source = source_with_plan(case, cached)
    export(source, [onnx_writer(tmp_path / "out", kv="int8")])
    scheme = read_scheme(tmp_path / "out", [plan_of(source)])
    assert differences(read_onnx(tmp_path / "out", source.model), measured(scheme, source.model)) == []


def test_w8a8_is_what_is_measured(planned: Callable[[str], Source], tmp_path: Path) -> None:
    source = planned("mixtral")
    export(source, [W8A8Writer(tmp_path / "out")])
    scheme = read_scheme(tmp_path / "out", [plan_of(source)])
    assert differences(read_w8a8(tmp_path / "out", source.model), measured(scheme, source.model)) == []
