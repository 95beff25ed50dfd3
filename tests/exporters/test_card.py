"""The model cards of folders that leave us, read by the Hub's own package, and what a validation writes into them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from huggingface_hub import ModelCard

from exporters.export import Source, Writer, export
from exporters.huggingface import ModelOptWriter, SmoothedWriter, W8A8Writer
from exporters.trtllm import TrtllmWriter, choose
from smoothquant.artifacts.card import BEGIN, CARD
from smoothquant.model import Model
from smoothquant.outputs import MANIFEST, check_content, load_manifest
from smoothquant.scheme import PER_TOKEN
from smoothquant.settings import SmoothingSettings
from tests.forked import smoothquant
from tests.int8_folders import edit_json, save_modelopt
from tests.models import TEXT, hooked_absmax, open_llama, sample_ids, save_llama
from tests.writers import onnx_writer

MakeLlama = Callable[..., Path]
FORMS: dict[str, Callable[[Path], Writer]] = {
    "hf": SmoothedWriter,
    "w8a8": W8A8Writer,
    "modelopt": ModelOptWriter,
    "onnx": lambda out: onnx_writer(out, "per-token"),
    "trtllm": lambda out: TrtllmWriter(out, choose(PER_TOKEN)),
}
LIBRARIES = {"onnx": "onnx", "trtllm": None}


def exported(folder: Path, out: Path, form: str = "w8a8") -> Path:
    model = open_llama(folder)
    absmax = hooked_absmax(folder, sample_ids())
    export(Source(model, SmoothingSettings(0.6), absmax, {"model": model.checkpoint.fingerprint}), [FORMS[form](out)])
    return out


@pytest.mark.parametrize("form", FORMS)
def test_the_hub_reads_it(form: str, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    edit_json(folder / "config.json", {"_name_or_path": "org/tiny-llama"})
    (folder / CARD).write_text(
        "---\nlicense: llama3.1\nlicense_link: https://example.org/terms\ntags:\n- x\n---\n# Tiny\n"
    )
    (folder / "LICENSE").write_text("the terms")
    (folder / "NOTICE.txt").write_text("whose it is")
    out = exported(folder, tmp_path / "out", form)
    card = ModelCard.load(out / CARD)
    assert (card.data.base_model, card.data.license) == ("org/tiny-llama", "llama3.1")
    assert (card.data.library_name, card.data.pipeline_tag) == (
        LIBRARIES.get(form, "transformers"),
        "text-generation",
    )
    assert card.data.license_link == "https://example.org/terms"
    assert "smoothquant" in card.data.tags
    assert ("int8" in card.data.tags) == (form != "hf")
    assert getattr(card.data, "base_model_relation", None) == (None if form == "hf" else "quantized")
    assert all(text in card.text for text in ("alpha 0.6", "llama3.1", "LICENSE, NOTICE.txt", "Not yet"))
    assert "# Tiny" not in card.text
    assert (out / "LICENSE").read_text() == "the terms"
    assert (out / "NOTICE.txt").read_text() == "whose it is"
    assert str(tmp_path) not in (out / CARD).read_text()


def test_an_export_of_an_export_keeps_the_base(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    edit_json(folder / "config.json", {"_name_or_path": "org/tiny-llama"})
    (folder / CARD).write_text("---\nlicense: mit\n---\n")
    smoothed = exported(folder, tmp_path / "hf", "hf")
    edit_json(smoothed / "config.json", {"_name_or_path": ""})
    card = ModelCard.load(exported(smoothed, tmp_path / "w8a8") / CARD)
    assert (card.data.base_model, card.data.license) == ("org/tiny-llama", "mit")


def test_a_converted_folder_has_one(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_modelopt(make_llama(), tmp_path / "int8")
    (folder / CARD).write_text("---\nlicense: mit\n---\n# Somebody's\n")
    found = smoothquant("convert", folder, "--to", "compressed-tensors", "--out", tmp_path / "out", "--quiet")
    assert found.returncode == 0, found.stderr
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert (card.data.license, card.data.base_model) == ("mit", None)
    assert "converted from | modelopt" in card.text
    assert "Somebody" not in card.text
    assert {"int8", "compressed-tensors"} <= set(card.data.tags)
    assert "vllm serve" in card.text


def test_a_model_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "models--org--tiny" / "snapshots" / "0f")
    assert ModelCard.load(exported(folder, tmp_path / "out") / CARD).data.base_model == "org/tiny"


HOSTILE = {
    "no card": None,
    "no front matter": "license: mit\n",
    "front matter without an end": "---\nlicense: mit\n",
    "a list": "---\nlicense: [mit]\nlicense_name: &a b\n---\n",
    "a line that ends it": '---\nlicense: "m\\n---\\nbase_model: evil/evil"\n---\n',
    "marks of ours": f"---\nbase_model: ../..\n---\n{BEGIN}\n{BEGIN}\n",
    "no characters": b"\xff\xfe---\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_model_says_stays_in_its_place(name: str, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "a|b <script> `c`\n# model")
    edit_json(folder / "config.json", {"_name_or_path": "org/x\n---\nlicense: evil"})
    content = HOSTILE[name]
    if content is not None:
        (folder / CARD).write_bytes(content if isinstance(content, bytes) else content.encode())
    out = exported(folder, tmp_path / "out")
    card = ModelCard.load(out / CARD)
    assert card.data.base_model is None
    assert card.data.license in (None, "m\\n---\\nbase_model: evil/evil")
    assert "<script>" not in card.text
    assert card.text.count("\n# ") + card.text.startswith("# ") == 1
    assert card.text.count(BEGIN) == 1


def test_a_card_that_is_no_file(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    os.mkfifo(folder / CARD)
    assert "not told" in (exported(folder, tmp_path / "pipe") / CARD).read_text()
    (folder / CARD).unlink()
    (tmp_path / "secret").write_text("---\nlicense: secret\n---\n")
    (folder / CARD).symlink_to(tmp_path / "secret")
    assert "secret" not in (exported(folder, tmp_path / "link") / CARD).read_text()


@pytest.fixture
def measured(llama: Model, tmp_path: Path) -> Path:
    """A folder that the command has validated, in `tmp_path`."""
    out = exported(llama.checkpoint.folder, tmp_path / "out")
    (tmp_path / "text.txt").write_text(TEXT)
    assert validated(out, llama).returncode == 0
    return out


def validated(out: Path, llama: Model, *options: object) -> CompletedProcess[str]:
    words = ("--reference", llama.checkpoint.folder, "--text", out.parent / "text.txt", "--samples", 2, "--length", 64)
    return smoothquant("validate", out, *words, "--no-thresholds", "--json", *options)


def test_a_validation_is_noted_in_the_card(measured: Path, llama: Model, tmp_path: Path) -> None:
    found = validated(measured, llama)
    assert f"{measured}/README.md: now says what was measured" in found.stderr
    metrics = json.loads(found.stdout)["validations"][0]["metrics"]
    card = ModelCard.load(measured / CARD)
    assert "Not yet" not in card.text
    assert f"mean {metrics['kl_mean']:.3g}" in card.text
    assert f"{metrics['perplexity']:.3f}" in card.text
    assert card.text.count("KL to the model") == 1  # two validations, one place
    manifest = load_manifest(measured)
    check_content(measured, manifest)
    assert set(manifest.files) | {MANIFEST} == {
        str(path.relative_to(measured)) for path in measured.rglob("*") if path.is_file()
    }
    assert smoothquant("check", measured, "--integrity").returncode == 0
    before = (measured / CARD).read_bytes()
    exported(llama.checkpoint.folder, measured)  # it is there already
    assert (measured / CARD).read_bytes() == before


def test_a_card_is_its_owners(measured: Path, llama: Model) -> None:
    """What people make of it is kept, and does not make the folder another one."""
    (measured / CARD).write_text("# Mine\n")
    found = validated(measured, llama)
    assert found.returncode == 0
    assert "now says" not in found.stderr
    assert (measured / CARD).read_text() == "# Mine\n"
    (measured / CARD).unlink()
    assert validated(measured, llama).returncode == 0
    assert smoothquant("check", measured, "--integrity").returncode == 0


def test_other_files_are_still_checked(measured: Path, llama: Model) -> None:
    """The control."""
    (measured / "config.json").write_text((measured / "config.json").read_text() + " ")
    assert smoothquant("check", measured, "--integrity").returncode != 0
    torch.manual_seed(0)
    assert validated(measured, llama).returncode == 2
