"""The real compiler on small graphs: what it says, and how its failures are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from builders.check import check
from builders.check.tensorrt_rtx import Compilation, available, compile_apart, compile_onnx, packages
from builders.check.tensorrt_rtx.packages import bindings
from builders.nvidia.profiles import single_profile
from builders.onnx_graph import OnnxGraph
from smoothquant.errors import MissingPackageError, UserError
from tests.builders.check.lint.graphs import LINEAR, PRODUCT, W, X, graph, saved
from tests.exporters.onnx.graphs import FORMS, W8A8_FORMS, export_onnx, products, source_of
from tests.lacking import with_compiler

PROFILE = single_profile(2, 16, 16)


@with_compiler
def test_apart_and_here_are_the_same(tmp_path: Path) -> None:
    path = saved(graph(f"{X} {W} {PRODUCT}"), tmp_path)
    here, apart = (compiled(path, PROFILE) for compiled in (compile_onnx, compile_apart))
    assert here.errors == apart.errors == ()
    assert here.layers == apart.layers
    assert here.int8_nodes() >= {f"{LINEAR}/MatMul"}
    assert any("Layers:" in message for message in here.messages)
    assert apart.messages == ()
    assert here.version == apart.version
    assert min(here.plan_bytes, here.weight_bytes, apart.peak_bytes) > 128 * 256


@with_compiler
def test_a_refusal_is_one_line_that_names_the_node(tmp_path: Path) -> None:
    body = "[layer__act__FastGelu] h = com.microsoft.FastGelu(x)  y = MatMul(h, w_float)"
    made = compile_onnx(saved(graph(body), tmp_path), PROFILE)
    assert made.layers == ()
    [error] = made.errors
    assert error.startswith("layer/act/FastGelu (FastGelu): ")
    assert "\n" not in error
    assert "Cuda Runtime" not in error


@with_compiler
def test_memory_grows_with_the_profile(llama_folder: Path, tmp_path: Path) -> None:
    out = export_onnx(source_of(llama_folder), tmp_path / "out") / "model.onnx"
    symbols = OnnxGraph(out).symbols
    small, large = (compile_onnx(out, profile, symbols) for profile in (PROFILE, single_profile(4, 256, 256)))
    assert 0 < small.activation_bytes < large.activation_bytes
    assert large.weight_bytes == pytest.approx(small.weight_bytes, rel=0.02)


@with_compiler
def test_what_is_not_int8_is_named_with_its_reason(tmp_path: Path) -> None:
    """One product of two is spoiled: it is named, with what spoils it, and the other is INT8."""
    body = f"""{X} {W} [good__MatMul] a = MatMul(xd, wd)
        h = Mul(xd, smooth)  vd = DequantizeLinear <axis = 1> (w_other, w_scale)
        [bad__MatMul] b = MatMul(h, vd)  y = Add(a, b)"""
    found = check(saved(graph(body), tmp_path), compile=lambda g: compile_onnx(g.path, PROFILE, g.symbols))
    assert {verdict.module: verdict.int8 for verdict in found.verdicts} == {"good": True, "bad": False}
    [lost] = found.lost
    assert lost.why.startswith("Mul stands between DequantizeLinear and the product, on its quantized input; multiply")
    assert found.kinds["Int8 gemm"] == 1
    assert not found.as_dict()["passed"]


def test_a_product_lost_for_no_known_reason(tmp_path: Path) -> None:
    path = saved(graph(f"{X} {W} {PRODUCT}"), tmp_path)
    found = check(path, compile=lambda g: Compilation())
    assert len(found.lost) == 1
    assert found.lost[0].why.startswith("no known reason; no layer of the engine names it")
    assert found.faults == [f"{LINEAR} is not INT8: {found.lost[0].why}"]


def test_every_product_of_an_export_has_its_verdict(llama_folder: Path, tmp_path: Path) -> None:
    out = export_onnx(source_of(llama_folder), tmp_path / "out", lm_head="int8")
    found = check(out, compile=lambda g: Compilation())
    assert [v.module for v in found.verdicts] == [p.name for p in products(OnnxGraph(out).proto.graph)]


@with_compiler
@pytest.mark.parametrize("form", W8A8_FORMS)
def test_every_form_of_graph(form: str, llama_folder: Path, tmp_path: Path) -> None:
    out = export_onnx(source_of(llama_folder), tmp_path / "out", **FORMS[form])
    found = check(out, compile=lambda g: compile_onnx(g.path, PROFILE, g.symbols))
    assert found.faults == []
    assert len(found.verdicts) == 8 + ("int8 head" in form)


@with_compiler
def test_a_compiler_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(graph(f"{X} {W} {PRODUCT}"), tmp_path)
    for code, said in (("import os; os.kill(os.getpid(), 9)", "killed.* memory"), ("raise OSError", "status 1")):
        dies = [sys.executable, "-c", code]
        run = subprocess.run
        monkeypatch.setattr(subprocess, "run", lambda command, dies=dies, run=run, **options: run(dies, **options))
        with pytest.raises(UserError, match=rf"graph\.onnx: the TensorRT-RTX compiler died \(.*{said}"):
            compile_apart(path, PROFILE)
        monkeypatch.undo()


CYCLE = """
import gc, sys
from builders.check.tensorrt_rtx import compile_onnx
from builders.nvidia import driver
from builders.nvidia.profiles import single_profile
from builders.check.tensorrt_rtx.packages import bindings
made, trt = driver.logger, bindings()
def logger(trt, messages):
    class Log(type(made(trt, messages))):
        def log(self, severity, message):
            if gc.isenabled():
                gc.collect()  # the collector may run wherever Python does
            super().log(severity, message)
    return Log()
driver.logger = logger
gc.set_threshold(0)
cycle = [trt.Builder(trt.Logger())]
cycle.append(cycle)
del cycle
assert not compile_onnx(sys.argv[1], single_profile(2, 16, 16)).errors
gc.collect()
"""


@with_compiler
def test_an_old_builder_in_the_garbage_is_no_deadlock(tmp_path: Path) -> None:
    path = saved(graph(f"{X} {W} {PRODUCT}"), tmp_path)
    subprocess.run([sys.executable, "-c", CYCLE, path], check=True, timeout=120, capture_output=True)


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    bindings.cache_clear()
    assert not available()
    for compiled in (compile_onnx, compile_apart):
        with pytest.raises(MissingPackageError) as caught:
            compiled(tmp_path / "model.onnx", PROFILE)
        assert caught.value.exit_code == 3
        assert str(caught.value).endswith(f"pip install {packages.VERSIONS}")
    bindings.cache_clear()
