"""smoothquant compare, and validate of other tools' folders, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders.transformers import TransformersEngine
from exporters.export import Source, export
from exporters.huggingface import ModelOptWriter, W8A8Writer
from smoothquant.model import Model
from smoothquant.outputs import OURS
from smoothquant.settings import SmoothingSettings
from tests.forked import smoothquant
from tests.int8_folders import edit_json, save_compressed_tensors
from tests.models import TEXT, save_llama
from tests.writers import onnx_writer, w8a8_writer

FEW = ("--samples", 4, "--length", 64)
TOKENS = [TEXT.encode()[start : start + 64] for start in range(0, 256, 64)]  # of the tiny models: their bytes


@pytest.fixture(scope="module")
def place(llama: Model, input_absmax: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w8a8, static, modelopt, onnx: exports of one model. stripped: w8a8 without what is ours. int8: another tool's."""
    root = tmp_path_factory.mktemp("place")
    source = Source(llama, SmoothingSettings(0.5), input_absmax, {"model": llama.checkpoint.fingerprint})
    static = w8a8_writer(root / "static", activations="per-tensor")
    export(source, [W8A8Writer(root / "w8a8"), static, onnx_writer(root / "onnx"), ModelOptWriter(root / "modelopt")])
    shutil.copytree(root / "w8a8", root / "stripped")
    shutil.rmtree(root / "stripped" / OURS)
    save_compressed_tensors(llama.checkpoint.folder, root / "int8")
    (root / "text.txt").write_text(TEXT)
    return root


def compare(place: Path, one: object, other: object) -> dict:
    found = smoothquant("compare", one, other, "--text", place / "text.txt", *FEW, "--json", "--quiet")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_a_side_and_itself(place: Path) -> None:
    found = compare(place, place / "int8", place / "int8")
    metrics = found["metrics"]
    assert (metrics["kl_mean"], metrics["top1"], metrics["top1_clear"], metrics["ambiguous"]) == (0, 1, 1, 0)
    assert metrics["perplexity"] == metrics["reference_perplexity"]
    assert found["kl_back"] == 0


def test_numbers_are_those_of_transformers(place: Path, llama: Model) -> None:
    """The float model by our decoder, and the folder by transformers, which is the same for static activations."""
    found = compare(place, llama.checkpoint.folder, place / "static")
    from transformers import LlamaForCausalLM

    ids = torch.tensor([list(map(byte_token(llama), part)) for part in TOKENS])
    plain = LlamaForCausalLM.from_pretrained(llama.checkpoint.folder, dtype=torch.float32)
    with torch.no_grad():
        p, q = (
            logits.double().log_softmax(-1)
            for logits in (plain(ids).logits, TransformersEngine(place / "static").logits(ids))
        )
    losses = [-each[:, :-1].gather(2, ids[:, 1:, None]).mean() for each in (p, q)]
    metrics = found["metrics"]
    assert metrics["tokens"] == ids.numel()
    assert metrics["reference_perplexity"] == pytest.approx(losses[0].exp().item(), rel=1e-5)  # float32 sums
    assert metrics["perplexity"] == pytest.approx(losses[1].exp().item(), rel=1e-5)
    assert metrics["kl_mean"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert found["kl_back"] == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-3)
    assert metrics["top1"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found["kl_back"] != metrics["kl_mean"]


def byte_token(llama: Model) -> object:
    """The token id of a byte, by the tiny models' tokenizer."""
    from act_scales.tokenizer import Encoder

    encoder = Encoder(llama.checkpoint.folder)
    return lambda byte: encoder.plain(chr(byte))[0]


def test_sides_of_every_kind(place: Path, llama: Model) -> None:
    """Exports of one model are near each other, whichever form they have and whoever runs them."""
    far = compare(place, llama.checkpoint.folder, place / "int8")["metrics"]["kl_mean"]  # without smoothing
    for one, other in (("stripped", "onnx"), ("onnx", "stripped"), ("modelopt", "static"), ("w8a8", "onnx")):
        found = compare(place, place / one, place / other)
        assert found["metrics"]["kl_mean"] < far / 4, (one, other)
        assert found["labels"] == [one, other]


def test_a_table_for_people(place: Path) -> None:
    found = smoothquant("compare", place / "stripped", place / "int8", "--text", place / "text.txt", *FEW)
    assert found.returncode == 0
    assert all(word in found.stdout for word in ("stripped", "int8", "perplexity", "clear", "ambiguous", "back"))


def refused(place: Path, *folders: object) -> str:
    found = smoothquant("compare", *folders, "--text", place / "text.txt", *FEW, "--quiet")
    assert (found.returncode, found.stdout) == (2, "")
    (line,) = found.stderr.splitlines()
    return line


def test_what_cannot_be_compared(place: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", vocab_size=320)
    assert "its model has vocab_size 320; expected 288, as int8 has" in refused(place, place / "int8", other)
    small = save_llama(tmp_path / "small", num_hidden_layers=1)
    assert "num_hidden_layers 1; expected 2" in refused(place, place / "onnx", small)
    assert "no such folder" in refused(place, place / "int8", tmp_path / "nothing")
    gptq = save_compressed_tensors(save_llama(tmp_path / "model"), tmp_path / "gptq")
    edit_json(gptq / "config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert "quant_method 'gptq'" in refused(place, place / "int8", gptq)
    edit_json(
        gptq / "config.json",
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
    )
    assert "quantization_config.format" in refused(place, place / "int8", gptq)
    without = shutil.copytree(place / "int8", tmp_path / "without")
    for path in without.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer in either" in refused(place, without, without)
    assert compare(place, without, place / "int8")["metrics"]["kl_mean"] == 0  # one is enough


def test_a_float_model_that_says_null(place: Path, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    edit_json(model / "config.json", {"quantization_config": None})
    assert compare(place, model, model)["metrics"]["kl_mean"] == 0


def test_another_tokenizer_is_refused(place: Path, llama: Model, tmp_path: Path) -> None:
    other = shutil.copytree(place / "int8", tmp_path / "other")
    content = (other / "tokenizer.json").read_text()
    assert '"d": ' in content
    spoiled = json.loads(content)
    vocabulary = spoiled["model"]["vocab"]
    vocabulary["d"], vocabulary["e"] = vocabulary["e"], vocabulary["d"]
    (other / "tokenizer.json").write_text(json.dumps(spoiled))
    assert "its tokenizer gives text.txt other tokens than that of" in refused(place, place / "int8", other)
    words = ("--reference", llama.checkpoint.folder, "--text", place / "text.txt", *FEW, "--quiet")
    found = smoothquant("validate", other, *words)
    assert found.returncode == 2
    assert "its tokenizer gives text.txt other tokens" in found.stderr


def test_another_model_of_the_same_sizes_is_told(place: Path, llama: Model, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=7)
    found = smoothquant("compare", llama.checkpoint.folder, other, "--text", place / "text.txt", *FEW, "--quiet")
    assert found.returncode == 0
    assert f"is made from model {llama.checkpoint.fingerprint}, other from" in found.stderr


def test_validate_tells_which_linears_hurt(place: Path, llama: Model, tmp_path: Path) -> None:
    """The report of another tool's folder, in which one scale is spoiled."""
    spoiled = shutil.copytree(place / "int8", tmp_path / "spoiled")
    wrong = "model.layers.1.mlp.gate_proj"
    tensors = load_file(spoiled / "model.safetensors")
    tensors[f"{wrong}.weight_scale"] *= 2
    save_file(tensors, spoiled / "model.safetensors", {"format": "pt"})
    words = (spoiled, place / "modelopt", "--reference", llama.checkpoint.folder, "--text", place / "text.txt", *FEW)
    found = smoothquant("validate", *words, "--report", tmp_path / "report.html", "--no-thresholds")
    assert found.returncode == 0, found.stderr
    assert f"spoiled: largest errors of linears (SQNR): {wrong} -" in found.stdout  # its error is as large as it
    assert "modelopt: largest errors of linears" in found.stdout
    page = (tmp_path / "report.html").read_text()
    assert f"lowest: {wrong}" in page
    assert "another quantizer" in page
    json_found = smoothquant("validate", *words, "--json", "--quiet", "--no-thresholds")
    first, second = json.loads(json_found.stdout)["validations"]
    assert first["worst"][0]["name"] == wrong
    assert (first["subject"]["engine"], second["subject"]["engine"]) == ("another quantizer", "export modelopt")
    assert (first["unexplained"], second["unexplained"]) == ("", "")
    missed = smoothquant("validate", *words, "--quiet", "--kl-mean", 1e-9)
    assert missed.returncode == 1
