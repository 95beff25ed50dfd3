"""`smoothquant validate` on a checkpoint folder: found by its manifest, run by the interpreter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from builders.engine.protocol import FOREIGN
from builders.engine.table import engine_manifest, open_engine
from builders.tensorrt_llm import CheckpointEngine
from smoothquant.artifacts.smoothing_file import SMOOTHING
from smoothquant.errors import CheckpointError
from smoothquant.workspace import Workspace
from tests.builders.tensorrt_llm.checkpoints import PER_TOKEN, write
from tests.forked import assert_one_line, smoothquant
from tests.models import TEXT, open_llama, sample_ids, save_tokenizer
from tests.outputs import made_from
from tests.zoo import build, save

VECTORS = Path(__file__).parents[1] / "vectors"


def export(model: Path, out: Path, algorithm: str | None = PER_TOKEN, **options: object) -> Path:
    """What `smoothquant export trtllm --groups none` leaves, as far as a validator needs it."""
    static = str(algorithm).endswith("PER_TENSOR_PLUGIN")
    activations = "float" if algorithm is None else "per-tensor" if static else "per-token"
    inputs = made_from(activations, model=open_llama(model).checkpoint.fingerprint)
    with Workspace(out, "export trtllm", inputs) as work:
        write(build("llama", outlier=1), work.folder, algorithm, **options)
        save_file({}, work.path(SMOOTHING))
        work.own()
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
    assert engine.manifest.origin.scheme.activations.form == "per-token"


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """The model behind NVIDIA's checkpoints. It has 128 tokens: no spaces, of a byte-level tokenizer."""
    folder = Path(shutil.copytree(VECTORS / "inputs/llama/hf", tmp_path / "hf"))
    save_tokenizer(folder)
    return folder


def test_validate_a_checkpoint_of_another_tool(reference: Path, tmp_path: Path) -> None:
    """NVIDIA's, which carries no manifest: measured, held to thresholds and reported, without errors of its linears."""
    text, names = tmp_path / "text.txt", ("llama-tp1", "llama-tp1-static")
    text.write_text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" * 20)
    arguments = ("--reference", reference, "--text", text, "--samples", 16, "--length", 64)
    out, report = tmp_path / "out.json", tmp_path / "report.html"
    found = smoothquant(
        "validate",
        *(VECTORS / name for name in names),
        *arguments,
        "--exact",
        "--out",
        out,
        "--report",
        report,
        "--no-thresholds",
    )
    assert found.returncode == 0, found.stderr
    assert "warning: llama-tp1: no distance to the exact logits, because its smoothing is not recorded" in found.stderr
    for name, entry in zip(names, json.loads(out.read_text())["validations"], strict=True):
        assert entry["label"] == name
        assert entry["subject"]["engine"] == FOREIGN
        assert entry["subject"]["bytes"] == (VECTORS / name / "rank0.safetensors").stat().st_size
        assert 0.01 < entry["metrics"]["relative_error"] < (0.3 if "static" in name else 0.1)
        assert entry["exactness"] is None
        assert entry["linears"] == []
    assert "Quantization error by layer" not in report.read_text()
    missed = smoothquant("validate", VECTORS / names[0], *arguments, "--relative-error", "1e-6", "--quiet")
    assert_one_line(missed, 1, "relative error of the logits", "would have passed")
    unmeasured = smoothquant("validate", VECTORS / names[0], *arguments, "--exactness-ratio", 2, "--quiet")
    assert_one_line(unmeasured, 2, "no exactness_ratio can be measured, because its smoothing is not recorded")


def test_a_checkpoint_of_another_model(reference: Path, tmp_path: Path) -> None:
    """Found before the reference runs: it would read behind the end of a table."""
    write(build("llama"), tmp_path / "checkpoint", PER_TOKEN)
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijklmnop" * 64)
    found = smoothquant("validate", tmp_path / "checkpoint", "--reference", reference, "--text", text, "--length", 64)
    assert_one_line(found, 2, "this checkpoint has vocab_size 288; expected 128, the reference's")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "config.json: not JSON"),
        ('{"architecture": "LlamaForCausalLM"}', ": "),
        (None, "config.json: no such file"),
    ],
)
def test_a_broken_config(content: str | None, said: str, tmp_path: Path) -> None:
    """The reason that `check` gives, not what follows from it."""
    folder = tmp_path / "checkpoint"
    write(build("llama"), folder)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        engine_manifest(folder)
    assert str(folder) in str(caught.value)
    assert "vocab_size None" not in str(caught.value)


def test_validate_an_engine_that_runs_elsewhere(reference: Path, tmp_path: Path) -> None:
    with Workspace(tmp_path / "engine", "build tensorrt-llm", {}) as work:
        work.path("rank0.engine").touch()
        work.commit()
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijklmnop" * 64)
    found = smoothquant("validate", tmp_path / "engine", "--reference", reference, "--text", text, "--length", 64)
    assert_one_line(
        found, 2, "made by 'build tensorrt-llm'", "serve it on its GPU", "validate the checkpoint behind it"
    )


def test_validate(model: Path, tmp_path: Path) -> None:
    """The float one is the model; W8A8 is near it; sharded, with an INT8 cache, a little less so."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    folders = [
        export(model, tmp_path / "float", None),
        export(model, tmp_path / "w8a8"),
        export(model, tmp_path / "sharded", tp=4, pp=2, kv_cache="INT8"),
    ]
    arguments = ("--reference", model, "--text", text, "--samples", 16, "--length", 64)
    found = smoothquant("validate", *folders, *arguments, "--json", "--quiet", "--no-thresholds")
    assert found.returncode == 0, found.stderr
    metrics = {entry["label"]: entry["metrics"] for entry in json.loads(found.stdout)["validations"]}
    assert metrics["float"]["relative_error"] < 1e-5
    assert metrics["float"]["top1"] == 1
    assert 1e-3 < metrics["w8a8"]["relative_error"] < 0.1
    assert 1e-3 < metrics["sharded"]["relative_error"] < 0.1
    missed = smoothquant("validate", folders[1], *arguments, "--relative-error", "1e-4", "--quiet")
    assert_one_line(missed, 1, "relative error of the logits", "would have passed")
