"""Small files in which anything may be, at every place where a command reads them: one line, at once, no traceback.

What the readers refuse is in `tests/smoothquant/test_reading.py`; here, that each of them is asked.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from act_scales.store import ActScales
from exporters.export import Source, export
from exporters.onnx.writer import OnnxWriter
from exporters.trtllm.writer import TrtllmWriter
from smoothquant.outputs import MANIFEST
from smoothquant.settings import SmoothingSettings
from tests.builders.serving.tensorrt_llm.test_serve_config import engine as trtllm_engine
from tests.faults import FAULTS
from tests.forked import smoothquant
from tests.models import TEXT, hooked_absmax, open_llama, sample_ids, save_llama
from tests.outputs import agree

FEW = ("--samples", "1", "--length", "32")
CALIBRATE = ("calibrate", "model", "--text", "text.txt", *FEW, "--out", "out.safetensors")
PLACES: dict[str, tuple[str, ...]] = {  # file -> the command that reads it
    "model/config.json": CALIBRATE,
    "model/tokenizer.json": CALIBRATE,
    "model/tokenizer_config.json": CALIBRATE,
    "model/model.safetensors": CALIBRATE,
    "scales.safetensors": ("scales", "show", "scales.safetensors"),
    "scales.pt": ("scales", "show", "scales.pt"),
    "onnx/smoothquant/manifest.json": ("check", "onnx"),
    "onnx/generation_config.json": ("generate", "onnx", "Once", "--max-new-tokens", "2"),
    "onnx/config.json": ("generate", "onnx", "Once", "--max-new-tokens", "2"),
    "onnx/model.onnx": ("check", "onnx/model.onnx"),
    "trtllm/config.json": ("build", "tensorrt-llm", "trtllm", "--out", "out"),
    "trtllm-engine/config.json": ("serve-config", "trtllm-engine", "--out", "out"),
}
BINARY = (".safetensors", ".pt", ".onnx")
ANY = ("empty", "NULs", "pipe", "folder", "endless", "hole")  # whatever the file is to hold
JSON = ("list", "deep object", "surrogate", "huge number", "not UTF-8")
FAULTS_OF = {place: ANY if place.endswith(BINARY) else (*ANY, *JSON) for place in PLACES}
HARMLESS = ("model/tokenizer_config.json", "surrogate")  # in a key that nobody reads
TRIALS = [(place, fault) for place in PLACES for fault in FAULTS_OF[place] if (place, fault) != HARMLESS]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(TEXT)
    maxima = hooked_absmax(save_llama(folder / "model"), sample_ids())
    ActScales(maxima).save(folder / "scales.safetensors")
    ActScales(maxima).save_pt(folder / "scales.pt")
    source = Source(open_llama(folder / "model"), SmoothingSettings(), maxima, {"model": "m", "act_scales": "a"})
    export(source, [OnnxWriter(folder / "onnx"), TrtllmWriter(folder / "trtllm")])
    trtllm_engine(folder / "trtllm-engine")
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_the_control(place: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is wrong, nothing is said to be."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    found = smoothquant(*PLACES[place])
    assert found.returncode == (3 if "tensorrt-llm" in PLACES[place] else 0), found.stderr


@pytest.mark.parametrize(("place", "fault"), TRIALS)
def test_one_line(place: str, fault: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / place
    file.unlink()
    FAULTS[fault](file)
    folder = tmp_path / file.relative_to(tmp_path).parts[0]
    if (folder / MANIFEST).is_file() and file.is_file() and fault != "hole" and file.name != "manifest.json":
        agree(folder)  # as an attacker would
    found = smoothquant(*PLACES[place], "--quiet")
    [line] = found.stderr.splitlines()
    assert line.startswith("smoothquant: "), line
    assert found.returncode == 2, line
    assert file.name in line or folder.name in line
    assert len(line) < 600
