"""A model folder is somebody else's: its names stay within it, and what is no regular file is not read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exporters.export import Source, export
from exporters.huggingface import W8A8Writer
from smoothquant.checkpoint import Checkpoint
from smoothquant.errors import CheckpointError
from smoothquant.settings import SmoothingSettings
from tests.models import open_llama

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", 7, ["x"], None]
)
def test_an_index_names_files_of_its_folder(place: object, make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    shutil.move(folder / "model.safetensors", folder.parent / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
    with pytest.raises(CheckpointError, match=r"outside of the folder|weight_map is .* that names the file of each"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_without_a_map(content: dict, make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"weight_map is .* that names the file of each tensor"):
        Checkpoint(folder)


def test_a_stale_index_is_passed_over(make_llama: Callable[..., Path]) -> None:
    """transformers takes the single file, too."""
    folder = make_llama()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    checkpoint = Checkpoint(folder)
    assert {info.file.name for info in checkpoint.tensors.values()} == {"model.safetensors"}
    assert checkpoint.notes == (f"{folder / INDEX} is passed over, since model.safetensors is there",)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_not_read(name: str, make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="no regular file"):
        Checkpoint(folder)


def test_a_link_out_of_the_folder_is_not_copied(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama()
    (tmp_path / "secret").write_text("a secret")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    source = Source(open_llama(folder), SmoothingSettings(groups="none"))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: a link to .*secret, outside of the model folder"):
        export(source, [W8A8Writer(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("tokenizer_config.json")  # within: as good as a copy
    export(Source(open_llama(folder), SmoothingSettings(groups="none")), [W8A8Writer(tmp_path / "out")])
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
    assert not (tmp_path / "out/chat_template.jinja").is_symlink()


def test_the_layout_of_the_hubs_cache(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """snapshots/REVISION holds links into blobs."""
    folder, home = make_llama(), tmp_path / "models--org--name"
    snapshot = home / "snapshots/0123"
    (home / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, home / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    plain, linked = Checkpoint(folder), Checkpoint(snapshot)
    assert (linked.fingerprint, linked.sidecars) == (plain.fingerprint, plain.sidecars)
    export(Source(open_llama(snapshot), SmoothingSettings(groups="none")), [W8A8Writer(tmp_path / "out")])
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_changed_sidecar_is_another_model_to_copy(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    before = Checkpoint(folder)
    fingerprint, sidecars = before.fingerprint, before.sidecars
    (folder / "tokenizer_config.json").write_text("{}")
    after = Checkpoint(folder)
    assert after.sidecars != sidecars
    assert after.fingerprint == fingerprint
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": 5e5}
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).fingerprint != fingerprint


def test_a_row_that_no_sample_would_see(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    before = Checkpoint(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][77] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert Checkpoint(folder).fingerprint != before
