"""smoothquant scales: published act scales from a Hub, one's own checked against a model, the forms.

The real command line with the real huggingface_hub, against a Hub on this machine.
"""

from __future__ import annotations

import io
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from act_scales.catalogue import CATALOGUE, REPOSITORY
from act_scales.store import INPUT, ActScales, load_act_scales
from smoothquant.checkpoint import Checkpoint
from tests.forked import assert_one_line, small_files, smoothquant
from tests.hub import COMMIT, Hub, serving
from tests.models import hooked_absmax, sample_ids, save_llama

FILE = "llama-2-7b.pt"  # the catalogue's; here it holds the small model's scales
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
Scales = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def absmax(model: Path) -> Scales:
    return hooked_absmax(model, sample_ids())


@pytest.fixture
def published(absmax: Scales) -> Scales:
    """The published form of this model's scales: lm_head is in it."""
    return absmax | {"lm_head": torch.ones(64)}


@pytest.fixture
def hub(published: Scales, tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub(REPOSITORY, tmp_path / "hf")) as hub:
        hub.files = {FILE: pickled(published), "opt-1.3b.pt": pickled({"model.decoder.layers.0.fc1": torch.ones(4)})}
        yield hub


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save(path: Path, content: object) -> Path:
    path.write_bytes(pickled(content))
    return path


# -- list ------------------------------------------------------------------------------------------------------------


def test_list_asks_the_hub(hub: Hub) -> None:
    hub.files["new-model.pt"] = b""
    found = smoothquant("scales", "list", "--json", env=hub.environment)
    assert found.returncode == 0, found.stderr
    listed = json.loads(found.stdout)
    assert {entry["file"]: entry["on_hub"] for entry in listed["scales"]} == {
        published.file: published.file in hub.files for published in CATALOGUE
    }
    assert listed["other_files"] == ["new-model.pt"]
    assert hub.asked == [f"GET /api/models/{REPOSITORY}"]
    shown = smoothquant("scales", "list", env=hub.environment).stdout
    assert "meta-llama/Llama-2-7b-hf" in shown
    assert "new-model.pt" in shown


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE is set", "cannot be reached"])
def test_list_without_a_network(why: str, hub: Hub) -> None:
    environment = hub.offline if "OFFLINE" in why else hub.environment | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    found = smoothquant("scales", "list", "--json", env=environment)
    assert found.returncode == 0, found.stderr
    assert {entry["on_hub"] for entry in json.loads(found.stdout)["scales"]} == {None}
    assert len(found.stderr.splitlines()) == 1
    assert why in found.stderr
    assert not hub.asked


# -- pull ------------------------------------------------------------------------------------------------------------


def test_pull(hub: Hub, published: Scales, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    found = smoothquant("scales", "pull", "llama-2-7b", "--out", out, env=hub.environment)
    assert found.returncode == 0, found.stderr
    assert f"{len(published)} linears, not checked" in found.stdout
    tensors = load_file(out)
    assert tensors.keys() == {name + INPUT for name in published}
    assert all(torch.equal(tensors[name + INPUT], values) for name, values in published.items())
    metadata = load_act_scales(out).metadata
    assert metadata["source"] == REPOSITORY
    assert (metadata["source_file"], metadata["source_commit"]) == (FILE, COMMIT)
    assert "model_fingerprint" not in metadata

    asked = len(hub.asked)
    again = tmp_path / "b.safetensors"  # the cache is enough from now on, and a model's Hub name is a name too
    pulled = smoothquant("scales", "pull", "meta-llama/Llama-2-7b-hf", "--out", again, env=hub.offline)
    assert pulled.returncode == 0, pulled.stderr
    assert again.read_bytes() == out.read_bytes()
    assert len(hub.asked) == asked


def test_pull_for_a_model(hub: Hub, model: Path, absmax: Scales, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    arguments = ("scales", "pull", "llama-2-7b", "--model", model, "--out", out, "--json")
    found = smoothquant(*arguments, env=hub.environment)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["linears"] == len(absmax)  # lm_head stays in float
    assert told["metadata"]["model_fingerprint"] == Checkpoint(model).fingerprint
    assert told["metadata"]["source_commit"] == COMMIT
    assert load_act_scales(out).input_absmax.keys() == absmax.keys()


def test_pull_for_another_model(hub: Hub, model: Path, tmp_path: Path) -> None:
    arguments = ("scales", "pull", "opt-1.3b", "--model", model, "--out", tmp_path / "a.safetensors", "--quiet")
    found = smoothquant(*arguments, env=hub.environment)
    assert_one_line(found, 2, "opt-1.3b.pt (scales of facebook/opt-1.3b): no activation scales for model.layers.0.")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_name_that_is_none(hub: Hub, tmp_path: Path) -> None:
    found = smoothquant(
        "scales", "pull", "llama-3-8b", "--out", tmp_path / "a.safetensors", "--quiet", env=hub.environment
    )
    names = ", ".join(published.name for published in CATALOGUE)
    assert_one_line(found, 2, f"no published act scales 'llama-3-8b'; expected one of {names}; ", "calibrate")
    assert not hub.asked


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE is set", "at http://127.0.0.1:1 cannot be reached"])
def test_pull_without_a_network(why: str, hub: Hub, tmp_path: Path) -> None:
    environment = hub.offline if "OFFLINE" in why else hub.environment | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    start = time.monotonic()
    arguments = ("scales", "pull", "llama-2-7b", "--out", tmp_path / "a.safetensors", "--quiet")
    found = smoothquant(*arguments, env=environment)
    assert_one_line(found, 4, f"{FILE}: not in the cache, and", why, "smoothquant scales import")
    assert time.monotonic() - start < 20  # huggingface_hub alone tries for 23 seconds
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == []


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_hub_that_refuses(status: int, hub: Hub, tmp_path: Path) -> None:
    hub.status = status
    arguments = ("scales", "pull", "llama-2-7b", "--out", tmp_path / "a.safetensors", "--quiet")
    found = smoothquant(*arguments, env=hub.environment)
    assert_one_line(found, 4, f"{FILE}: not in the cache, and {REPOSITORY}", f"{status}")


def test_files_that_are_gone(hub: Hub, tmp_path: Path) -> None:
    arguments = ("scales", "pull", "llama-2-7b", "--out", tmp_path / "a.safetensors", "--quiet")
    del hub.files[FILE]
    found = smoothquant(*arguments, env=hub.environment)
    assert_one_line(found, 4, f"{FILE}: not in the cache, and {REPOSITORY}", "see smoothquant scales list")
    hub.listed = [FILE]
    assert_one_line(smoothquant(*arguments, env=hub.environment), 4, f"{FILE}: the download from {REPOSITORY} failed")


def test_a_download_that_is_none(hub: Hub, tmp_path: Path) -> None:
    hub.files[FILE] = b"<html>Sign in to this network</html>"
    found = smoothquant(
        "scales", "pull", "llama-2-7b", "--out", tmp_path / "a.safetensors", "--quiet", env=hub.environment
    )
    assert_one_line(found, 2, f"{FILE}: ", "code", "not run")


def test_a_cache_without_room(hub: Hub, tmp_path: Path) -> None:
    arguments = ("scales", "pull", "llama-2-7b", "--out", tmp_path / "a.safetensors", "--quiet")
    found = smoothquant(*arguments, env=hub.environment, set_up=small_files(4096))
    assert_one_line(found, 4, f"{hub.home}/hub: no space left for the output")
    assert smoothquant(*arguments, env=hub.environment).returncode == 0  # with room


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    hub.home.write_text("a file, where a folder should be")
    found = smoothquant(
        "scales", "pull", "llama-2-7b", "--out", tmp_path / "a.safetensors", "--quiet", env=hub.environment
    )
    assert_one_line(found, 4, f"{hub.home}", "Not a directory")


# -- import ----------------------------------------------------------------------------------------------------------


def test_import(model: Path, published: Scales, absmax: Scales, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    mine = save(tmp_path / "mine.pt", {name: values.half() for name, values in published.items()})
    found = smoothquant("scales", "import", mine, "--model", model, "--out", out, "--json")
    assert found.returncode == 0, found.stderr
    scales = load_act_scales(out)
    assert scales.metadata["model_fingerprint"] == Checkpoint(model).fingerprint
    assert scales.input_absmax.keys() == absmax.keys()
    assert all(torch.equal(values, absmax[name].half().float()) for name, values in scales.input_absmax.items())
    # once more, of our own form, and refused for another model with the same shapes
    again = smoothquant("scales", "import", out, "--model", model, "--out", tmp_path / "b.safetensors")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "b.safetensors").read_bytes() == out.read_bytes()
    other = save_llama(tmp_path / "other", seed=1)
    refused = smoothquant("scales", "import", out, "--model", other, "--out", tmp_path / "c.safetensors")
    assert_one_line(refused, 2, "a.safetensors: activation scales of another model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({DOWN: None}, f"no activation scales for {DOWN}; expected one of shape [128]"),
        (
            {"model.layers.2.mlp.up_proj": torch.ones(64)},
            "scales for model.layers.2.mlp.up_proj, which this model does",
        ),
        ({Q: torch.ones(63)}, f"activation scales of {Q} have shape [63]; expected [64]"),
        ({Q: torch.full((64,), float("nan"))}, f"{Q}.input_absmax holds NaN"),
    ],
)
def test_scales_that_do_not_fit(change: dict, said: str, model: Path, published: Scales, tmp_path: Path) -> None:
    changed = {name: values for name, values in (published | change).items() if values is not None}
    mine = save(tmp_path / "mine.pt", changed)
    found = smoothquant("scales", "import", mine, "--model", model, "--out", tmp_path / "a.safetensors")
    assert_one_line(found, 2, "mine.pt: ", said)
    assert not (tmp_path / "a.safetensors").exists()


# -- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs(hub: Hub, model: Path, published: Scales, tmp_path: Path) -> None:
    mine, out = save(tmp_path / "mine.pt", published), tmp_path / "a.safetensors"
    out.write_text("precious")
    pull = ("scales", "pull", "llama-2-7b", "--out")
    imported = ("scales", "import", mine, "--model", model, "--out")
    convert = ("scales", "convert", mine, "--out")
    for command in (pull, imported):
        assert_one_line(
            smoothquant(*command, out, env=hub.environment), 2, "a.safetensors exists, and it is no act scales file"
        )
    assert not hub.asked
    assert out.read_text() == "precious"
    for command, place, said in (
        (pull, tmp_path / "a.pt", "a.pt: this command writes .safetensors"),
        (imported, tmp_path / "nowhere" / "a.safetensors", f"no such folder {tmp_path}/nowhere"),
        (convert, mine, "mine.pt is the act scales"),
        (
            convert,
            tmp_path / "b.safetensors",
            "this command writes .pt; expected a name that ends in .pt; for the other",
        ),
    ):
        assert_one_line(smoothquant(*command, place, env=hub.offline), 2, said)
    assert_one_line(smoothquant(*imported, out, "--overwrite"), 2, "a.safetensors exists, and it is no act scales file")
    out.unlink()
    assert smoothquant(*imported, out).returncode == 0
    assert_one_line(smoothquant(*imported, out), 2, "a.safetensors exists; expected a new file")
    assert smoothquant(*imported, out, "--overwrite").returncode == 0
    assert load_act_scales(out).metadata["model_fingerprint"] == Checkpoint(model).fingerprint
    family = ("--family", tmp_path / "family.py")
    assert_one_line(smoothquant(*pull, tmp_path / "b.safetensors", *family), 2, "--family without --model")


def test_a_disk_that_fills_up(model: Path, published: Scales, tmp_path: Path) -> None:
    mine, out = save(tmp_path / "mine.pt", published), tmp_path / "a.safetensors"
    arguments = ("scales", "import", mine, "--model", model, "--out", out)
    found = smoothquant(*arguments, set_up=small_files(4096))
    assert_one_line(found, 4, f"{out}: no space left for the output")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pt"]
    assert smoothquant(*arguments).returncode == 0


def test_convert_is_read_by_torch(absmax: Scales, tmp_path: Path) -> None:
    ActScales(absmax).save(tmp_path / "ours.safetensors")
    found = smoothquant("scales", "convert", tmp_path / "ours.safetensors", "--out", tmp_path / "theirs.pt")
    assert found.returncode == 0, found.stderr
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert theirs.keys() == absmax.keys()
    assert all(torch.equal(values, absmax[name]) for name, values in theirs.items())


def test_help() -> None:
    shown: subprocess.CompletedProcess[str] = smoothquant("scales", "--help")
    for action in ("list", "pull", "import", "show", "convert"):
        assert action in shown.stdout
