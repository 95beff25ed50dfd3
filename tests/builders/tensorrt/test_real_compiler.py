"""The builder against a real compiler: TensorRT-RTX, which has nearly TensorRT 11's API and builds without a GPU.

Its packages are optional (`builders.check.tensorrt_rtx.packages`).
"""

from __future__ import annotations

import _thread
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from builders.check.tensorrt_rtx.packages import bindings
from builders.tensorrt.compiler import Options, compile_graph
from builders.tensorrt.limits import limits_for
from smoothquant.errors import UserError
from tests.gpu import overflow
from tests.lacking import require_compiler
from tests.outputs import facts

PROFILES = limits_for(facts(512, None), batch=2, length=64, chunk=16).profiles


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """TensorRT-RTX where `import tensorrt` finds it."""
    require_compiler()
    module = bindings()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.mark.filterwarnings("ignore:Use Deprecated")  # RTX keeps no timing cache
@pytest.mark.parametrize("form", ["float", "per-token", "per-tensor"])
def test_builds(form: str, exports: dict[str, Path], tmp_path: Path, rtx: ModuleType) -> None:
    seen: list[int] = []
    compiled = compile_graph(
        exports[form] / "model.onnx",
        PROFILES,
        Options(workspace=0.5, optimization_level=2, tf32=False),
        timing_cache=tmp_path / "timing.cache",
        progress=lambda done, total: seen.append(done),
    )
    assert memoryview(compiled.plan).nbytes > 100_000
    assert len(seen) > 2
    assert seen == sorted(set(seen))
    assert seen[-1] <= 1000
    assert any("Int64" in warning for warning in compiled.warnings)
    assert (tmp_path / "timing.cache").exists()


@pytest.mark.parametrize("chunk", [2, 16, 64])
def test_builds_whatever_the_chunk(chunk: int, exports: dict[str, Path], rtx: ModuleType) -> None:
    """Where a prompt is one chunk, nothing is ever behind it: an input that is always empty."""
    limits = limits_for(facts(512, None), length=64, chunk=chunk)
    assert compile_graph(exports["per-token"] / "model.onnx", limits.profiles, Options()).plan is not None


def test_refused_graph_names_the_node(exports: dict[str, Path], tmp_path: Path, rtx: ModuleType) -> None:
    shutil.copyfile(exports["per-token"] / "model.onnx.data", tmp_path / "model.onnx.data")
    model = onnx.load(exports["per-token"] / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type = "Hardmax2"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError) as caught:
        compile_graph(tmp_path / "model.onnx", PROFILES, Options())
    line = str(caught.value)
    assert "parser refuses it at model.layers.0.attention/Softmax (Hardmax2): " in line
    assert "\n" not in line


def test_missing_weights(exports: dict[str, Path], tmp_path: Path, rtx: ModuleType) -> None:
    (tmp_path / "model.onnx").write_bytes((exports["per-token"] / "model.onnx").read_bytes())
    with pytest.raises(UserError, match="TensorRT's parser refuses it"):
        compile_graph(tmp_path / "model.onnx", PROFILES, Options())


@pytest.mark.parametrize("float16_scales", [False, True])
def test_graphs_of_the_overflow_check_build(float16_scales: bool, tmp_path: Path, rtx: ModuleType) -> None:
    """What they compute is for a GPU to say: tests/gpu."""
    overflow.save(tmp_path / "model.onnx", 4096, float16_scales=float16_scales)
    assert compile_graph(tmp_path / "model.onnx", [], Options()).plan is not None


def test_interrupted(exports: dict[str, Path], rtx: ModuleType) -> None:
    """Ctrl-C while the compiler is at work: it stops at its next step."""
    steps: list[int] = []

    def interrupt(done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == 1:
            _thread.interrupt_main()
            time.sleep(0.5)  # until the thread that waits has passed it on

    with pytest.raises(KeyboardInterrupt):
        compile_graph(exports["per-token"] / "model.onnx", PROFILES, Options(), progress=interrupt)
    assert len(steps) == 1
