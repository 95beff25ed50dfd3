"""Calibration, validation and reproduction on a device, with one layer on it at a time: the numbers are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import current_thread
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from act_scales import collect as calibration
from act_scales.collect import collect
from act_scales.text import Text
from builders.validate import run as validation
from builders.validate.run import validate_engines
from exporters.export import Source, export
from exporters.huggingface import ModelOptWriter
from recipes import reproduce as reproduction
from recipes.models import RECIPES
from recipes.recipe import find
from smoothquant import hidden, workroom
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.models import open_llama, sample_ids, save_llama
from tests.stand_in_device import NAME, StandIn

LAYERS, MATRICES = 5, 7
T = TypeVar("T")
On = Callable[[str, Callable[[str], T]], T]


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(tuple(sample_ids(2, 10)), "sample")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose layers are larger than all else."""
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 128, "intermediate_size": 352, "head_dim": 32}
    return open_llama(save_llama(tmp_path_factory.mktemp("wide"), **sizes))


@pytest.fixture(scope="module")
def folder(wide: Model, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Act scales and a W8A8 folder in ModelOpt's form, which runs beside the reference."""
    root = tmp_path_factory.mktemp("made")
    scales = collect(wide, text, root / "act_scales.safetensors", dtype="float32", device="cpu")
    source = Source(wide, SmoothingSettings(0.5), scales.input_absmax, {"model": wide.checkpoint.fingerprint})
    export(source, [ModelOptWriter(root / "w8a8")])
    return root


@pytest.fixture(params=["states on the CPU", "states on the device"])
def on(request: pytest.FixtureRequest, wide: Model, monkeypatch: pytest.MonkeyPatch) -> On:
    """on(device, call): what the call gives. The stand-in never holds more than one layer with its forms, and another
    thread has pinned every layer."""
    threads: list[str] = []

    def pin(tensor: Tensor) -> Tensor:
        threads.append(current_thread().name)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(hidden, "free_bytes", lambda device: 0 if request.param.endswith("CPU") else 1 << 30)
    for module in (calibration, validation, reproduction):
        monkeypatch.setattr(module, "choose_device", lambda name="auto": "cpu" if name == "auto" else name)
    layer = sum(weight.nbytes for weight in float_layer(wide, 0).weights.values())

    def run(device: str, call: Callable[[str], T]) -> T:
        threads.clear()
        if device == "cpu":
            found = call(device)
            assert not threads
            return found
        with StandIn() as stand_in:
            found = call(device)
        assert layer < stand_in.most < 2.5 * layer  # with the INT8 form, and its largest matrix in float64
        assert len(threads) == LAYERS * MATRICES
        assert all(name.startswith("ahead") for name in threads)
        return found

    return run


def test_calibration(on: On, wide: Model, text: Text, tmp_path: Path) -> None:
    found, expected = (
        on(name, lambda name: collect(wide, text, tmp_path / f"{name}.safetensors", dtype="float32", device=name))
        for name in (NAME, "cpu")
    )
    assert found.input_absmax.keys() == expected.input_absmax.keys()
    for name, maxima in expected.input_absmax.items():
        torch.testing.assert_close(found.input_absmax[name], maxima, rtol=1e-5, atol=1e-6)


def test_validation(on: On, wide: Model, text: Text, folder: Path) -> None:
    engines = {"w8a8": folder / "w8a8"}
    [found], [expected] = (
        on(name, lambda name: validate_engines(engines, wide, text, exact=True, device=name)) for name in (NAME, "cpu")
    )
    assert found.metrics.perplexity == pytest.approx(expected.metrics.perplexity, rel=1e-3)
    assert found.metrics.kl_mean == pytest.approx(expected.metrics.kl_mean, rel=0.1)
    assert [one.sqnr for one in found.linears] == pytest.approx([one.sqnr for one in expected.linears], abs=0.1)
    assert found.exactness is not None
    assert 0 < found.exactness.engine < 0.1


def test_reproduction_goes_on_after_an_interruption(
    on: On, wide: Model, text: Text, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, scales = find("llama", RECIPES), folder / "act_scales.safetensors"

    def run(name: str, out: str, stop: int = -1) -> reproduction.Reproduction:
        def progress(done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        return reproduction.reproduce(recipe, wide, scales, text, tmp_path / out, device=name, progress=progress)

    expected = on("cpu", lambda name: run(name, "cpu")).measured
    whole = on(NAME, lambda name: run(name, "whole")).measured
    assert whole.plain == pytest.approx(expected.plain, rel=1e-5)
    assert whole.w8a8 == pytest.approx(expected.w8a8, rel=1e-3)
    assert whole.w8a8 != pytest.approx(expected.plain, rel=1e-5)
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0)
    with StandIn():
        with pytest.raises(KeyboardInterrupt):
            run(NAME, "stopped", 2)
        assert run(NAME, "stopped").measured == whole
