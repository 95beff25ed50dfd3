"""Other opsets are the same model; two forms in one export share their weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.validate import read_scheme
from exporters.export import export
from smoothquant.errors import UserError
from smoothquant.static import linears_to_keep
from tests.exporters.onnx.graphs import Runner
from tests.families.case import Case
from tests.families.differences import GRAPH, largest_difference, token_errors
from tests.models import sample_ids
from tests.writers import onnx_writer

LAYOUTS = ["llama", "mistral", "falcon-7b", "falcon-rw", "bloom", "opt", "gemma2", "gemma3", "mixtral", "phi3-partial"]


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_opsets_are_the_same_model(layout: str, opset: int, tmp_path: Path) -> None:
    case, ids = Case(layout, tmp_path), sample_ids(2, 20, seed=2)
    out = tmp_path / "float"
    export(case.source, [onnx_writer(out, "float", opset=opset)])
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    assert [(found.domain, found.version) for found in model.opset_import] == [("", opset)]
    expected = case.logits(ids)
    assert largest_difference(Runner(out / "model.onnx").run(ids)[0], expected) <= GRAPH
    chunked = Runner(out / "model.onnx")
    parts = [chunked.run(ids[:, :9])[0], *(chunked.run(ids[:, i : i + 1])[0] for i in range(9, 20))]
    assert largest_difference(torch.cat(parts, dim=1), expected) <= GRAPH


@pytest.mark.parametrize("opset", [17, 23])
def test_quantized_products_of_other_opsets_are_integer_kernels(opset: int, tmp_path: Path) -> None:
    case, ids = Case("llama", tmp_path), sample_ids(8, 16, seed=3)
    export(case.source, [onnx_writer(tmp_path / "onnx", opset=opset)])
    assert build(tmp_path / "onnx", tmp_path / "engine").results["kernels"] == {"integer": 8, "quantized": 8}
    found = OnnxRuntimeEngine(tmp_path / "engine").logits(ids)
    assert token_errors(found, case.w8a8(ids, "per-token")).median() <= 1e-6


def test_unknown_opset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ONNX export: 19; expected one of 17, 21, 23"):
        onnx_writer(tmp_path, opset=19)


@pytest.mark.parametrize("keep", ["none", "down"])
def test_both_forms_share_their_weights(keep: str, tmp_path: Path) -> None:
    case, ids = Case("llama-biased", tmp_path), sample_ids(4, 16, seed=3)
    kept = linears_to_keep(keep, case.model, case.source.input_absmax, case.source.settings)
    export(
        case.source,
        [
            onnx_writer(tmp_path / "both", "both", kept=kept),
            onnx_writer(tmp_path / "token", "per-token"),
            onnx_writer(tmp_path / "tensor", "per-tensor", kept=kept),
        ],
    )
    sizes = {name: (tmp_path / name / "model.onnx.data").stat().st_size for name in ("both", "token", "tensor")}
    scales = 2 * 4 * 64  # of the static graph's inputs, each in its place
    more = sum(4 * 64 * 128 + 4096 for _ in kept)
    assert sizes["token"] <= sizes["both"] <= sizes["token"] + scales + more
    for act, alone in (("per-token", "token"), ("per-tensor", "tensor")):
        build(tmp_path / "both", tmp_path / f"engine-{act}", activations=act)
        found = OnnxRuntimeEngine(tmp_path / f"engine-{act}")
        assert torch.equal(found.logits(ids), OnnxRuntimeEngine(tmp_path / alone).logits(ids))
        scheme = read_scheme(tmp_path / f"engine-{act}").scheme
        assert scheme.activations.form == act
        assert scheme.float_linears == (tuple(kept) if act == "per-tensor" else ())
    weights = {act: tmp_path / f"engine-{act}/model.onnx.data" for act in ("per-token", "per-tensor")}
    assert weights["per-token"].read_bytes() == weights["per-tensor"].read_bytes()
    assert not weights["per-token"].samefile(weights["per-tensor"])  # who changes one does not change the other


def test_a_form_that_an_export_does_not_hold(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    with pytest.raises(UserError, match="its activations are per-token; expected per-tensor"):
        build(case.export("per-token"), tmp_path / "engine", activations="per-tensor")
