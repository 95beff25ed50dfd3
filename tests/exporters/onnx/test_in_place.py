"""A cache that is written in place: the same model as with one that grows, in buffers that hide what nobody wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import onnx
import pytest
import torch

from builders.check import check
from builders.check.tensorrt_rtx import Compilation, available, compile_onnx
from builders.nvidia.profiles import Profile, single_profile
from builders.onnx_graph import OnnxGraph
from builders.onnxruntime.session import CACHES
from exporters.export import export
from smoothquant.errors import UserError
from tests.exporters.onnx.graphs import Runner, export_onnx, source_of
from tests.families.case import SETTINGS, Case
from tests.families.differences import GRAPH, largest_difference, token_errors
from tests.lacking import with_compiler
from tests.models import sample_ids
from tests.writers import onnx_writer

CAPACITY, STALE = 24, 100
LAYOUTS = ["llama", "falcon-7b", "falcon-rw", "opt", "gemma2", "gemma3", "mixtral", "phi3-partial"]


class InPlaceRunner:
    """A graph in ONNX Runtime with past and present in the same buffers. They begin with numbers that would spoil the
    logits if they were seen."""

    def __init__(self, path: Path, batch: int) -> None:
        self.session = Runner(path).session
        self.binding = self.session.io_binding()
        self.buffers = []
        for value in self.session.get_inputs():
            if value.name.startswith("past"):
                buffer = numpy.full((batch, *value.shape[1:]), STALE, CACHES[value.type])
                self.buffers.append(buffer)
                where = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
                self.binding.bind_input(value.name, *where)
                self.binding.bind_output(value.name.replace("past_key_values", "present"), *where)

    def run(self, ids: torch.Tensor, *before: int) -> torch.Tensor:
        """Logits of ids (batch, tokens), each row behind so many tokens."""
        self.binding.bind_cpu_input("input_ids", ids.numpy())
        self.binding.bind_cpu_input("write_indices", numpy.array(before))
        self.binding.bind_output("logits")
        self.session.run_with_iobinding(self.binding)
        return torch.from_numpy(self.binding.get_outputs()[-1].numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_same_model(layout: str, tmp_path: Path) -> None:
    """By transformers and by the cache that grows, in pieces and by tokens, up to the last place of the buffers."""
    case, ids = Case(layout, tmp_path), sample_ids(2, CAPACITY, seed=2)
    for name, capacity in (("grown", None), ("place", CAPACITY)):
        export(case.source, [onnx_writer(tmp_path / name, "float", capacity=capacity)])
    onnx.checker.check_model(str(tmp_path / "place/model.onnx"), full_check=True)
    expected = case.logits(ids)
    runner = InPlaceRunner(tmp_path / "place/model.onnx", 2)
    steps = [(0, 9), (9, 17), *((i, i + 1) for i in range(17, CAPACITY))]
    found = torch.cat([runner.run(ids[:, a:b], a, a) for a, b in steps], dim=1)
    assert largest_difference(found, expected) <= GRAPH
    assert torch.equal(found[:, -4:].argmax(-1), expected[:, -4:].argmax(-1))
    assert largest_difference(found, Runner(tmp_path / "grown/model.onnx").run(ids)[0]) <= GRAPH
    assert not any((buffer == STALE).all(axis=(0, 1, 3)).any() for buffer in runner.buffers)  # all is written


def test_rows_of_different_lengths(tmp_path: Path) -> None:
    """A row may have padding on its right: the next run writes over it."""
    case, ids = Case("gemma3", tmp_path), sample_ids(2, 20, seed=4)
    export(case.source, [onnx_writer(tmp_path / "onnx", "float", capacity=CAPACITY)])
    runner, lengths = InPlaceRunner(tmp_path / "onnx/model.onnx", 2), [11, 5]
    first = runner.run(ids[:, :11], 0, 0)
    parts = [[first[0, :11]], [first[1, :5]]]
    for step in range(9):
        row_ids = torch.stack([ids[row, lengths[row] + step] for row in range(2)])[:, None]
        logits = runner.run(row_ids, *(length + step for length in lengths))
        for row in range(2):
            parts[row].append(logits[row])
    expected = case.logits(ids)
    assert largest_difference(torch.cat(parts[0]), expected[0]) <= GRAPH
    assert largest_difference(torch.cat(parts[1]), expected[1, :14]) <= GRAPH


@pytest.mark.parametrize("layout", ["llama", "falcon-rw"])
def test_an_int8_cache(layout: str, tmp_path: Path) -> None:
    """ONNX Runtime writes integers in place; TensorRT does not, and the linter says so."""
    case, ids = Case(layout, tmp_path), sample_ids(16, 16, seed=8)
    source = replace(case.source, settings=replace(SETTINGS, cache="own"))
    for name, capacity in (("grown", None), ("place", CAPACITY)):
        export(source, [onnx_writer(tmp_path / name, kv="int8", capacity=capacity)])
    runner = InPlaceRunner(tmp_path / "place/model.onnx", 16)
    assert {buffer.dtype for buffer in runner.buffers} == {numpy.dtype(numpy.int8)}
    parts = [runner.run(ids[:, :7], *[0] * 16), *(runner.run(ids[:, i : i + 1], *[i] * 16) for i in range(7, 16))]
    expected = Runner(tmp_path / "grown/model.onnx").run(ids)[0]
    assert token_errors(torch.cat(parts, dim=1), expected).median() <= 1e-5
    found = check(tmp_path / "place", compile=compiled if available() else None)
    assert {finding.rule for finding in found.findings} == {"scatter-cache"}
    if available():
        assert "cache has type Int8" in found.compilation.errors[0]


@pytest.mark.parametrize(
    ("layout", "body"), [("llama", "fp32"), ("llama", "bf16"), ("gemma2", "fp16"), ("falcon-rw", "fp16")]
)
def test_tensorrt_takes_it(layout: str, body: str, tmp_path: Path) -> None:
    export(Case(layout, tmp_path).source, [onnx_writer(tmp_path / "out", body=body, capacity=CAPACITY)])
    found = check(tmp_path / "out", compile=compiled if available() else None)
    assert found.faults == []
    assert found.findings == ()
    for finding in check(tmp_path / "out", tensorrt=(10, 14)).findings:
        assert "TensorScatter, which came with 10.15" in finding.what


@with_compiler
def test_attention_copies_no_cache_for_a_token(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """In half precision the operator reads the buffers where they are; basic operators would copy them first."""
    folder = make_llama(hidden_size=256, head_dim=64, num_hidden_layers=1)
    out = export_onnx(source_of(folder), tmp_path / "out", activations="float", body="fp16", capacity=256)
    found = compile_onnx(out / "model.onnx", Profile("decode", (1, 1, 1), (1, 1, 1), (0, 0, 0)))
    names = [layer.name for layer in found.layers]
    assert any("mha" in name for name in names)
    assert not any(name.startswith(("__myl_TranReshMove", "__myl_ReshMove")) for name in names)


def compiled(graph: OnnxGraph) -> Compilation:
    return compile_onnx(graph.path, single_profile(4, 8, 0), graph.symbols)


def test_opsets_and_capacities(tmp_path: Path) -> None:
    for options in ({"opset": 24}, {"opset": 21, "capacity": 8}):
        with pytest.raises(UserError, match="expected opset 24 for a cache in place, and for nothing else"):
            onnx_writer(tmp_path, **options)
