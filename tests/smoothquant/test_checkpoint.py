"""Reading checkpoints of every form, and saying what is wrong with the others."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from smoothquant.checkpoint import Checkpoint
from smoothquant.errors import CheckpointError, UserError
from tests.models import open_llama

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def as_shards(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_old_bin(folder: Path) -> None:
    """The format of torch < 1.6, which cannot be mapped."""
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


def as_bin_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for part in range(2):
        file = f"pytorch_model-{part + 1:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names[part::2]}, folder / file)
        weight_map |= dict.fromkeys(names[part::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


FILES = {as_shards: 6, as_bin: 1, as_old_bin: 1, as_bin_shards: 2}


@pytest.mark.parametrize("form", FILES)
def test_every_form_reads_the_same(form: Callable[[Path], None], make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    expected = load_file(folder / "model.safetensors")
    fingerprint = Checkpoint(folder).fingerprint
    form(folder)
    model = open_llama(folder)
    assert len({info.file for info in model.checkpoint.tensors.values()}) == FILES[form]
    for name, tensor in expected.items():
        assert torch.equal(model.read(name), tensor)
        assert torch.equal(torch.cat(list(model.rows(name, step=7))), tensor)
    assert model.checkpoint.fingerprint == fingerprint


def test_dtypes(make_llama: Callable[..., Path]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        checkpoint = Checkpoint(make_llama(dtype=dtype))
        assert checkpoint.dtype == dtype
        assert checkpoint.read(NORM).dtype == dtype


def test_embedding_rows(llama: object, make_llama: Callable[..., Path]) -> None:
    model = open_llama(make_llama())
    ids = torch.tensor([[5, 0, 287], [5, 5, 3]])
    assert torch.equal(model.lookup(EMBEDDING, ids), model.read(EMBEDDING)[ids])


def test_fingerprint_sees_a_finetune(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    before = Checkpoint(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM] = tensors[NORM] + 2**-10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert Checkpoint(folder).fingerprint != before


# -- what can be wrong with a folder ---------------------------------------------------------------------------------


def change(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def configure(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return spoil


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def corrupt_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:40] = bytes(32)
    (folder / "model.safetensors").write_bytes(bytes(data))


def lose_a_shard(folder: Path) -> None:
    as_shards(folder)
    (folder / "model-00002-of-00006.safetensors").unlink()


def malicious_bin(folder: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (folder / "owned",))

    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({NORM: Payload()}, file)


SPOILED = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "config lacks a number": (configure(hidden_size=None), "cannot read the numbers of a llama .*hidden_size"),
    "heads do not divide": (configure(num_attention_heads=3), "3 attention heads over 2 kv heads"),
    "unknown activation": (configure(hidden_act="mish"), "activation 'mish' is not supported; expected one of silu"),
    "unknown rope": (configure(rope_parameters={"rope_type": "axial"}), "RoPE type 'axial' is not supported"),
    "rope without a number": (
        configure(rope_parameters={"rope_type": "yarn"}),
        "of type 'yarn' and have no factor; .* add \"factor\"",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "truncated": (truncate, r"model\.safetensors: truncated or corrupt"),
    "corrupt header": (corrupt_header, r"model\.safetensors: truncated or corrupt"),
    "missing shard": (lose_a_shard, r"model-00002-of-00006\.safetensors: missing shard"),
    "missing tensor": (change(NORM, None), r"tensor model\.norm\.weight is missing; expected shape \[64\]"),
    "wrong shape": (change(NORM, torch.ones(65)), r"model\.norm\.weight has shape \[65\]; expected \[64\]"),
    "unknown tensor": (change("model.extra.weight", torch.ones(3)), r"model\.extra\.weight is not part of a llama"),
    "quantized already": (change(NORM, torch.ones(64, dtype=torch.int8)), r"model\.norm\.weight has dtype I8"),
    "more layers than weights": (configure(num_hidden_layers=3), r"tensor model\.layers\.2\.\S+ is missing"),
    "fewer layers than weights": (configure(num_hidden_layers=1), r"tensor model\.layers\.1\.\S+ is not part"),
    "malicious .bin": (malicious_bin, "it holds more than tensors"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_spoiled_folder_is_explained(fault: str, make_llama: Callable[..., Path]) -> None:
    spoil, message = SPOILED[fault]
    folder = make_llama()
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_llama(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "owned").exists()


def test_no_folder() -> None:
    with pytest.raises(CheckpointError, match="no such folder; expected a Hugging Face model folder"):
        Checkpoint("does/not/exist")


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_shard_that_goes_away_or_is_another_one_later(exchanged: bool, make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    model = open_llama(folder)
    model.read(NORM)
    if exchanged:  # of the same size and time of modification
        before = os.stat(folder / "model.safetensors")
        shutil.copy(make_llama(seed=1) / "model.safetensors", folder / "model.safetensors")
        os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (folder / "model.safetensors").stat().st_size == before.st_size
    else:
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors was changed while it was read"):
        model.read(NORM)


@pytest.mark.parametrize(
    "name",
    ["self_attn.rotary_emb.inv_freq", "self_attn.rotary_emb.cos_cached", "self_attn.rotary_emb.sin_cached"],
)
def test_old_buffers_are_known(name: str, make_llama: Callable[..., Path]) -> None:
    """Llama checkpoints of 2023 carry each layer's rotary frequencies."""
    folder = make_llama()
    change(f"model.layers.0.{name}", torch.ones(8))(folder)
    assert not any(name in one for one in open_llama(folder).checkpoint.tensors)


def test_position_ids_are_no_weights(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    change("model.embeddings.position_ids", torch.arange(8))(folder)
    open_llama(folder)


def test_a_bias_of_zeros_adds_nothing(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    bias = "model.layers.0.self_attn.q_proj.bias"
    change(bias, torch.zeros(64))(folder)
    open_llama(folder)
    change(bias, torch.eye(64)[3])(folder)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is not part of a llama"):
        open_llama(folder)


@pytest.mark.parametrize("said", [{"quant_method": "gptq", "bits": 4}, {}, "gptq", ["gptq"]])
def test_what_is_left_of_a_quantization_is_dropped_and_said(said: object, make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    configure()(folder)
    before = Checkpoint(folder)
    configure(quantization_config=said)(folder)
    after = Checkpoint(folder)
    assert (after.config, after.fingerprint) == (before.config, before.fingerprint)
    assert before.notes == ()
    (note,) = after.notes
    named = said["quant_method"] if isinstance(said, dict) and said else None
    assert f"its quantization_config (quant_method {named}) is dropped, since the weights are float" in note


def test_quantized_weights_are_refused(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    configure(quantization_config={"quant_method": "gptq"})(folder)
    change("model.layers.0.self_attn.q_proj.qweight", torch.zeros(8, 8, dtype=torch.int32))(folder)
    with pytest.raises(CheckpointError, match=r"quantized weights .*quant_method gptq.*give the original checkpoint"):
        Checkpoint(folder)


# -- folders that are taken for a model folder -------------------------------------------------------------------------


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "a LoRA adapter, .* merge it first: python -c"),
        (("refs/main", "snapshots/abc/config.json"), r"the root of a model in the Hub's cache.*snapshots/abc"),
        (
            ("models--org--name/snapshots/abc/config.json",),
            r"the Hub's cache, .*models--org--name/snapshots/abc",
        ),
        (("model-Q4_K_M.gguf",), "GGUF files, .* hf download ORG/MODEL"),
        (
            ("pytorch_model.bin",),
            "config.json: no such file, though there are weights; .* hf download ORG/MODEL config.json",
        ),
        (
            ("model.safetensors",),
            "config.json: no such file, though there are weights; .* hf download ORG/MODEL config.json",
        ),
        (("README.md",), "config.json: no such file"),
    ],
)
def test_a_folder_near_to_a_model(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(lay(tmp_path, *names))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "before", "named"),
    [
        (("adapter_config.json",), "merge it first: ", "."),
        (("snapshots/abc/config.json",), "give its newest snapshot: ", "snapshots/abc"),
        (("model.safetensors",), "get it: ", "."),
    ],
)
def test_the_command_to_type_names_the_folder_whatever_its_name(
    names: tuple[str, ...], before: str, named: str, tmp_path: Path
) -> None:
    folder = lay(tmp_path / "a b'c", *names)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert shlex.split(caught.value.do.removeprefix(before))[-1] == str(folder / named)


def test_the_command_that_merges_an_adapter_runs(tmp_path: Path) -> None:
    """With a stand-in for peft that notes what it is asked for."""
    (tmp_path / "peft.py").write_text(
        "class AutoPeftModelForCausalLM:\n"
        "    from_pretrained = classmethod(lambda cls, folder: open('asked', 'w').write(folder) and cls)\n"
        "    merge_and_unload = classmethod(lambda cls: cls)\n"
        "    save_pretrained = classmethod(lambda cls, folder: open(folder, 'w').close())\n"
    )
    folder = lay(tmp_path / "a b'c", "adapter_config.json")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    command = caught.value.do.removeprefix("merge it first: ").replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True)
    assert (tmp_path / "asked").read_text() == str(folder)
    assert (tmp_path / "merged").exists()


def test_an_adapter_beside_a_whole_model_is_passed_over(make_llama: Callable[..., Path]) -> None:
    open_llama(lay(make_llama(), "adapter_config.json"))


def test_a_config_out_of_all_proportion_is_not_read(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    with open(folder / "config.json", "wb") as file:
        file.truncate(2**40)  # it takes no room
    with pytest.raises(CheckpointError, match=r"config\.json: 1099511627776 bytes; expected at most"):
        open_llama(folder)
