"""What is found out before the reference runs, for hours perhaps: that an engine cannot run here, or not this text."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from act_scales.text import Text
from builders.tensorrt import hardware
from builders.tensorrt.build import build
from builders.validate import run, validate_engines
from exporters.export import Source, export
from smoothquant.errors import MissingPackageError, UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.builders.tensorrt import fake
from tests.models import sample_ids
from tests.outputs import agree
from tests.writers import onnx_writer

Try = Callable[..., str]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake.FakeGpu:
    found = fake.FakeGpu()
    monkeypatch.setattr(hardware, "find_gpu", lambda: found)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module())
    return found


@pytest.fixture
def plan(llama: Model, input_absmax: dict[str, torch.Tensor], tmp_path: Path, gpu: fake.FakeGpu) -> Path:
    source = Source(llama, SmoothingSettings(0.5), input_absmax, {"model": llama.checkpoint.fingerprint})
    export(source, [onnx_writer(tmp_path / "onnx")])
    build(tmp_path / "onnx", tmp_path / "plan", {"length": 64, "chunk": 16})
    return tmp_path / "plan"


@pytest.fixture
def refused(llama: Model, text: Text, folders: Path, monkeypatch: pytest.MonkeyPatch) -> Try:
    """The line with which a second engine is refused; the reference must not have begun."""
    monkeypatch.setattr(run, "Reference", lambda *_, **__: pytest.fail("the reference ran"))

    def refuse(folder: Path, kind: type[UserError] = UserError, text: Text = text) -> str:
        with pytest.raises(kind) as caught:
            validate_engines({"good": folders / "hf", "bad": folder}, llama, text)
        return str(caught.value)

    return refuse


def test_a_plan_of_another_gpu(plan: Path, gpu: fake.FakeGpu, refused: Try) -> None:
    gpu.name, gpu.capability = "NVIDIA A100", (8, 0)
    assert "built for compute capability 9.0 (NVIDIA H100 80GB HBM3), this GPU has 8.0" in refused(plan)


def test_without_tensorrt(plan: Path, monkeypatch: pytest.MonkeyPatch, refused: Try) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert refused(plan, MissingPackageError).startswith("the package tensorrt ")


def test_a_plan_that_is_damaged(plan: Path, refused: Try) -> None:
    (plan / "model.plan").write_bytes(b"\x00" * (plan / "model.plan").stat().st_size)
    assert "its content is not what was written" in refused(plan)
    agree(plan)  # and should the manifest not know: TensorRT does
    assert "refuses this plan" in refused(plan)


def test_a_plan_for_shorter_sequences(plan: Path, refused: Try) -> None:
    line = refused(plan, text=Text(tuple(sample_ids(1, 65)), "long"))
    assert "a sequence of 65 tokens; expected at most 64, for which the engine was built" in line


def test_a_checkpoint_without_its_package(folders: Path, monkeypatch: pytest.MonkeyPatch, refused: Try) -> None:
    """Engines of every kind."""
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert "pip install compressed-tensors" in refused(folders / "w8a8", MissingPackageError)


def test_the_text_comes_before_the_engines(llama: Model, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_engine", lambda folder: pytest.fail("opened"))
    with pytest.raises(UserError, match="no sequence of two tokens or more"):
        validate_engines({"hf": folders / "hf"}, llama, Text((), "nothing"))


def test_no_engine_lies_in_memory_beside_the_reference_or_another(
    llama: Model, text: Text, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref] = []
    gone: list[str] = []
    open_engine, reference = run.open_engine, run.Reference

    def alone(what: str) -> None:
        assert not any(engine() for engine in opened)
        gone.append(what)

    def noted(folder: Path) -> Any:
        alone(folder.name)
        engine = open_engine(folder)
        opened.append(weakref.ref(engine))
        return engine

    def begun(*arguments: Any, **options: Any) -> Any:
        alone("the reference")
        return reference(*arguments, **options)

    monkeypatch.setattr(run, "open_engine", noted)
    monkeypatch.setattr(run, "Reference", begun)
    validate_engines({label: folders / label for label in ("hf", "static")}, llama, text)
    assert gone == ["hf", "static", "the reference", "hf", "static"]
