"""Others read the folders: their top holds what they read, all that is ours is in `smoothquant/`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from builders.engine.table import engine_manifest
from exporters.export import Source, Writer, export
from exporters.huggingface import SmoothedWriter, W8A8Writer
from exporters.trtllm import Ranks, TrtllmWriter
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.outputs import FORMAT, MANIFEST, OURS, TOP_MANIFEST, load_manifest
from smoothquant.settings import SmoothingSettings
from tests.outputs import TOKENIZER, top
from tests.writers import onnx_writer, w8a8_writer

SHARD = 100_000  # bytes: several shards of the tiny model
SHARDED = {"w8a8-sharded", "hf-sharded"}
TOPS = {
    "hf": {"model.safetensors"},
    "w8a8": {"model.safetensors"},
    "static": {"model.safetensors"},
    "onnx": {"model.onnx", "model.onnx.data"},
    "both": {"model.onnx", "model.per-tensor.onnx", "model.onnx.data"},
    "trtllm": {"rank0.safetensors", "rank1.safetensors"},
}


@pytest.fixture(scope="module")
def folders(llama: Model, input_absmax: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    writers: list[Writer] = [
        SmoothedWriter(root / "hf"),
        SmoothedWriter(root / "hf-sharded", max_shard=SHARD),
        W8A8Writer(root / "w8a8"),
        W8A8Writer(root / "w8a8-sharded", max_shard=SHARD),
        w8a8_writer(root / "static", "per-tensor"),
        onnx_writer(root / "onnx"),
        onnx_writer(root / "both", "both"),
        TrtllmWriter(root / "trtllm", ranks=Ranks(tp=2)),
    ]
    export(Source(llama, SmoothingSettings(), input_absmax, {"model": "m"}), writers)
    return root


def test_every_writer_is_looked_at(folders: Path) -> None:
    assert {folder.name for folder in folders.iterdir()} == TOPS.keys() | SHARDED


@pytest.mark.parametrize("name", TOPS)
def test_the_top_is_theirs(name: str, folders: Path) -> None:
    assert top(folders / name) == TOPS[name] | TOKENIZER | {"config.json", "README.md"}
    kept = {"tokenizer.json"} if "model.onnx" in TOPS[name] else set()  # an engine generates
    assert {path.name for path in (folders / name / OURS).iterdir()} == {
        "manifest.json",
        "smoothing.safetensors",
        *kept,
    }


@pytest.mark.parametrize("name", sorted(SHARDED))
def test_the_index_owns_every_shard(name: str, folders: Path) -> None:
    """vLLM reads every *.safetensors at the top, whether or not the index names it."""
    index = json.loads((folders / name / "model.safetensors.index.json").read_text())
    there = {path.name for path in (folders / name).glob("*.safetensors")}
    assert len(there) > 1
    assert set(index["weight_map"].values()) == there


def as_earlier(folder: Path, out: Path) -> Path:
    """A folder as the version before wrote it: our files at the top."""
    made = load_manifest(folder)
    out.mkdir()
    for name, facts in made.files.items():
        (out / Path(name).name).write_bytes((folder / name).read_bytes())
        assert (out / Path(name).name).stat().st_size == facts.size
    files = {Path(name).name: facts.size for name, facts in made.files.items()}
    (out / TOP_MANIFEST).write_text(json.dumps({**made.as_dict(), "format": 2, "files": files}))
    return out


@pytest.mark.parametrize("name", ["w8a8", "trtllm"])
def test_a_folder_of_an_earlier_version_is_refused_with_the_command(name: str, folders: Path, tmp_path: Path) -> None:
    """A TensorRT-LLM checkpoint is not taken for another tool's, either."""
    old = as_earlier(folders / name, tmp_path / "old")
    with pytest.raises(UserError) as caught:
        engine_manifest(old)
    assert str(caught.value) == (
        f"{old}: made by an earlier version of this tool (format 2); expected format {FORMAT}; "
        f"make it again: smoothquant export {name} MODEL ACT_SCALES --out {old} --overwrite"
    )


def test_a_folder_of_a_later_version_is_refused(folders: Path, tmp_path: Path) -> None:
    later = {**load_manifest(folders / "hf").as_dict(), "format": 99}
    (tmp_path / OURS).mkdir()
    (tmp_path / MANIFEST).write_text(json.dumps(later))
    with pytest.raises(UserError, match=r"made by a later version of this tool \(format 99\)"):
        load_manifest(tmp_path)
