"""Which class opens which folder, and transformers as a reader of ours."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from builders.engine.table import ENGINES, open_engine
from builders.transformers import OLDEST, TransformersEngine
from exporters.export import Source, export
from exporters.huggingface import SmoothedWriter, W8A8Writer
from smoothquant.artifacts.manifest import Manifest
from smoothquant.errors import MissingPackageError, UserError
from smoothquant.model import Model
from smoothquant.outputs import FORMAT
from smoothquant.settings import SmoothingSettings
from tests.models import hooked_absmax, open_llama, sample_ids
from tests.outputs import agree, made_from, write_manifest


@pytest.fixture(scope="module")
def exports(llama: Model, input_absmax: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    source = Source(llama, SmoothingSettings(0.5), input_absmax, {"model": "m"})
    export(source, [SmoothedWriter(root / "hf"), W8A8Writer(root / "w8a8")])
    return root


def test_every_known_step_names_a_class_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The class that a step names is the one that opens its folder."""
    for step, (module, name, _) in ENGINES.items():
        opened: list[Path] = []
        fake = ModuleType(module)
        setattr(fake, name, lambda folder, opened=opened: opened.append(folder))
        monkeypatch.setitem(sys.modules, module, fake)
        write_manifest(tmp_path, step)
        open_engine(tmp_path)
        assert opened == [tmp_path]


def test_a_step_that_gives_nothing_to_run(tmp_path: Path) -> None:
    write_manifest(tmp_path, "calibrate")
    with pytest.raises(UserError, match=r"made by 'calibrate'.*expected .*build onnxruntime, .*export w8a8"):
        open_engine(tmp_path)


def test_a_folder_that_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an output of this tool"):
        open_engine(tmp_path)


def test_the_export_behind_an_engine() -> None:
    inputs = made_from("per-token", model="m")
    engine = Manifest(FORMAT, "build onnxruntime", {"export": inputs, "threads": 2}, {}, {})
    export = Manifest(FORMAT, "export onnx", inputs, {}, {})
    assert engine.origin == export.origin
    assert engine.origin.model == "m"


@torch.no_grad()
def test_smoothed_folder_runs_as_the_model(exports: Path, llama_folder: Path) -> None:
    ids = sample_ids(sequences=3)
    engine = open_engine(exports / "hf")
    assert isinstance(engine, TransformersEngine)
    found = engine.logits(ids)
    assert (found.shape, found.dtype) == ((3, 48, 288), torch.float32)
    expected = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)(ids).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()  # the contract of smoothing


def test_w8a8_folder_runs_quantized(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inputs of linears take at most 256 values per token, weights are int8 times a scale."""
    engine = open_engine(exports / "w8a8")
    assert isinstance(engine, TransformersEngine)
    assert capsys.readouterr().err == ""  # no progress bars of others
    linear = engine.model.model.layers[1].mlp.down_proj
    stored = load_file(exports / "w8a8/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert linear.weight.dtype == torch.float32
    assert linear.weight.equal(stored[name].float() * stored[f"{name}_scale"])
    ids = sample_ids(sequences=2)
    together = engine.logits(ids)
    for n in range(2):  # dynamic per token: a sequence does not depend on its neighbours
        assert engine.logits(ids[n : n + 1])[0].argmax(-1).equal(together[n].argmax(-1))


def test_tied_embeddings_are_nothing_missing(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama(tie_word_embeddings=True)
    source = Source(open_llama(folder), SmoothingSettings(0.5), hooked_absmax(folder, sample_ids()), {"model": "m"})
    export(source, [SmoothedWriter(tmp_path / "hf"), W8A8Writer(tmp_path / "w8a8")])
    for name in ("hf", "w8a8"):
        assert open_engine(tmp_path / name).logits(sample_ids(sequences=1)).isfinite().all()


def test_a_missing_tensor_is_no_silent_random_weight(exports: Path, tmp_path: Path) -> None:
    shutil.copytree(exports / "hf", tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    agree(tmp_path / "hf")
    with pytest.raises(UserError, match=r"missing tensors.*layers\.0\.mlp\.up_proj\.weight"):
        TransformersEngine(tmp_path / "hf")


def test_without_compressed_tensors(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)  # as if it were not installed
    with pytest.raises(MissingPackageError, match=r"need compressed-tensors.*pip install compressed-tensors"):
        open_engine(exports / "w8a8")


def test_a_transformers_that_is_too_old(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVIDIA's older images have it: everything but this runs with it."""
    monkeypatch.setattr("transformers.__version__", "4.53.1")
    for name in ("hf", "w8a8"):
        with pytest.raises(MissingPackageError, match=r"transformers 4\.53\.1 is too old to run .*expected 4\.56"):
            open_engine(exports / name)
    assert f'"transformers>={OLDEST}"' in (Path(__file__).parents[3] / "pyproject.toml").read_text()
