"""`smoothquant validate` on a checkpoint folder: found by its manifest, run by the interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from builders.engine import open_engine
from builders.tensorrt_llm import CheckpointEngine
from smoothquant.errors import UserError
from smoothquant.settings import SMOOTHING
from smoothquant.workspace import Workspace
from tests.builders.tensorrt_llm.checkpoints import PER_TOKEN, write
from tests.models import TEXT, open_llama, sample_ids
from tests.recipes.test_bad_input import assert_one_line, smoothquant
from tests.zoo import build, save


def export(model: Path, out: Path, algorithm: str | None = PER_TOKEN, **options: object) -> Path:
    """What `smoothquant export trtllm --groups none` leaves, as far as a validator needs it."""
    static = str(algorithm).endswith("PER_TENSOR_PLUGIN")
    activations = "float" if algorithm is None else "per-tensor" if static else "per-token"
    inputs = {"model": open_llama(model).checkpoint.fingerprint, "activations": activations}
    with Workspace(out, "export trtllm", inputs) as work:
        write(build("llama", outlier=1), work.folder, algorithm, **options)
        save_file({}, work.path(SMOOTHING))
        work.commit()
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("model"), outlier=1)


def test_a_folder_is_opened_by_its_manifest(model: Path, tmp_path: Path) -> None:
    engine = open_engine(export(model, tmp_path / "checkpoint", tp=2))
    assert isinstance(engine, CheckpointEngine)
    logits = engine.logits(sample_ids(sequences=2))
    assert (logits.shape, logits.dtype) == ((2, 48, 288), torch.float32)
    assert logits.isfinite().all()
    assert engine.manifest["inputs"]["activations"] == "per-token"


def test_a_checkpoint_of_another_tool(tmp_path: Path) -> None:
    write(build("llama"), tmp_path)
    with pytest.raises(UserError, match="not an output of this tool"):
        CheckpointEngine(tmp_path)


def test_validate(model: Path, tmp_path: Path) -> None:
    """The float one is the model; W8A8 is near it; sharded, with an INT8 cache, a little less so."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    folders = [
        export(model, tmp_path / "float", None),
        export(model, tmp_path / "w8a8"),
        export(model, tmp_path / "sharded", tp=4, pp=2, kv_cache="INT8"),
    ]
    arguments = ("--reference", model, "--text", text, "--samples", 4, "--length", 64)
    found = smoothquant("validate", *folders, *arguments, "--json", "--quiet")
    assert found.returncode == 0, found.stderr
    metrics = {entry["label"]: entry["metrics"] for entry in json.loads(found.stdout)["validations"]}
    assert metrics["float"]["relative_error"] < 1e-5
    assert metrics["float"]["top1"] == 1
    assert 1e-3 < metrics["w8a8"]["relative_error"] < 0.1
    assert 1e-3 < metrics["sharded"]["relative_error"] < 0.1
    missed = smoothquant("validate", folders[1], *arguments, "--relative-error", "1e-4", "--quiet")
    assert_one_line(missed, 1, "relative error of the logits", "would have passed")
