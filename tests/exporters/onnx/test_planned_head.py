"""A graph by a plan holds the plan's head: ONNX Runtime computes what our arithmetic says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from safetensors.torch import load_file
from torch import Tensor

from builders.validate import read_scheme
from builders.validate.layers import W8A8Stream
from exporters.export import Source, export
from exporters.onnx import OnnxWriter
from smoothquant.artifacts.plan import HEAD
from smoothquant.artifacts.smoothing_file import SMOOTHING
from smoothquant.contract import relative_error
from smoothquant.head import UNPLANNED, head_logits
from smoothquant.layers import float_layer
from smoothquant.scheme import PER_TENSOR, PER_TOKEN, Scheme, scheme_of
from smoothquant.sweep import Sweep
from tests.exporters.onnx.graphs import Runner
from tests.families.case import Case
from tests.models import sample_ids
from tests.plans import plan_of, source_with_plan
from tests.writers import onnx_writer

LAYOUTS = ("llama", "llama-tied", "opt", "opt-350m", "gemma2", "gemma3", "granite", "bloom")
INT8_HEAD = scheme_of("per-token", head="int8")
IDS = sample_ids(2, 24, seed=5)
SCALE = "lm_head.smoothing_scale"


def source_of(name: str, root: Path, scheme: Scheme = INT8_HEAD) -> Source:
    return source_with_plan(Case(name, root), scheme)


def stored(folder: Path, file: str = "model.onnx") -> dict[str, Tensor]:
    initializers = onnx.load(folder / file).graph.initializer
    return {one.name: torch.from_numpy(to_array(one).copy()) for one in initializers}


@torch.no_grad()
def ours(source: Source, folder: Path, planned: bool = True) -> Tensor:
    """The logits of an export by what validation rebuilds of it, (tokens, vocab). planned: with the plan's head."""
    scheme = read_scheme(folder, [plan_of(source)])
    stream = W8A8Stream(source.model, scheme)
    sweep = Sweep(source.model, tuple(IDS), (stream,))
    sweep.embed()
    for index in range(source.model.geometry.layers):
        sweep.layer(float_layer(source.model, index))
    hidden = torch.cat([sweep.states(number, stream.form(torch.float32)) for number in range(len(IDS))])
    return stream.logits(hidden) if planned else head_logits(source.model, scheme.scheme, hidden, UNPLANNED)


@pytest.mark.parametrize("name", LAYOUTS)
def test_onnxruntime_computes_the_planned_head(name: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path)
    export(source, [OnnxWriter(tmp_path / "out", INT8_HEAD)])
    [found] = Runner(tmp_path / "out/model.onnx").run(IDS)
    expected, nearest = (ours(source, tmp_path / "out", known) for known in (True, False))
    error, other = (relative_error(found.flatten(0, 1), each) for each in (expected, nearest))
    assert error < (5e-3 if name == "opt-350m" else 1e-6)  # of which tokens round to the other side of a step
    assert other > max(3 * error, 5e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_file_holds_its_integers(name: str, tmp_path: Path) -> None:
    """The weight and the scale to the bit; the norm divided by the scale, which the smoothing file tells."""
    source = source_of(name, tmp_path)
    export(source, [OnnxWriter(tmp_path / "out", INT8_HEAD)])
    graph, head = stored(tmp_path / "out"), load_file(plan_of(source).folder / HEAD)
    assert graph["lm_head.weight_int8"].T.equal(head["lm_head.weight"])
    assert graph["lm_head.weight_scale"].equal(head["lm_head.weight_scale"])
    smoothing = load_file(tmp_path / "out" / SMOOTHING)
    assert (SCALE in smoothing) == (SCALE in head) == (name != "opt-350m")
    if SCALE in head:
        assert smoothing[SCALE].equal(head[SCALE])
        norm = source.model.norm_at(str(source.model.family.final_norm))
        gain = graph[f"{source.model.family.final_norm}.weight"]
        torch.testing.assert_close(gain * head[SCALE], norm.gain.float(), rtol=1e-6, atol=0)
        if norm.bias is not None:
            bias = graph[f"{source.model.family.final_norm}.bias"]
            torch.testing.assert_close(bias * head[SCALE], norm.bias.float(), rtol=1e-6, atol=1e-12)


def test_a_float_head_by_that_plan(tmp_path: Path) -> None:
    """Nothing is folded for it. Two graphs share what the plan says."""
    source = source_of("llama", tmp_path)
    export(source, [OnnxWriter(tmp_path / "float", PER_TOKEN), OnnxWriter(tmp_path / "int8", INT8_HEAD)])
    plain, graph = stored(tmp_path / "float"), stored(tmp_path / "int8")
    assert plain["model.norm.weight"].equal(source.model.read("model.norm.weight").float())
    assert not graph["model.norm.weight"].equal(plain["model.norm.weight"])
    assert plain["lm_head.weight"].T.equal(source.model.read("lm_head.weight"))
    assert SCALE not in load_file(tmp_path / "float" / SMOOTHING)
    assert SCALE in load_file(tmp_path / "int8" / SMOOTHING)
    [found] = Runner(tmp_path / "float/model.onnx").run(IDS)
    assert relative_error(found.flatten(0, 1), ours(source, tmp_path / "float")) < 1e-6


@pytest.mark.parametrize("plan", [PER_TOKEN, None])
def test_an_int8_head_that_no_plan_knows(plan: Scheme | None, tmp_path: Path) -> None:
    """Is rounded to nearest, and its norm is the model's."""
    case = Case("llama", tmp_path)
    source = source_with_plan(case, plan) if plan else case.source
    export(source, [OnnxWriter(tmp_path / "out", INT8_HEAD)])
    graph, weight = stored(tmp_path / "out"), source.model.read("lm_head.weight")
    assert graph["model.norm.weight"].equal(source.model.read("model.norm.weight").float())
    rounded = (weight / graph["lm_head.weight_scale"][:, None]).round()
    assert graph["lm_head.weight_int8"].T.float().equal(rounded)
    assert SCALE not in load_file(tmp_path / "out" / SMOOTHING)


def test_other_bodies_and_static_activations(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path, replace(PER_TENSOR, head=INT8_HEAD.head))
    export(source, [onnx_writer(tmp_path / "fp16", "per-tensor", body="fp16", lm_head="int8")])
    export(source, [onnx_writer(tmp_path / "fp32", "per-tensor", lm_head="int8")])
    expected, nearest = (ours(source, tmp_path / "fp32", known) for known in (True, False))
    for body, most in (("fp32", 1e-6), ("fp16", 0.06)):  # float16 rounds many inputs to the other side of a static step
        [found] = Runner(tmp_path / body / "model.onnx").run(IDS)
        assert relative_error(found.flatten(0, 1), expected) < most
        assert relative_error(found.flatten(0, 1), nearest) > 0.07
