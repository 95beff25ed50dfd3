"""Calibration: the maxima that hooks on transformers' own model see, whatever happens on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from act_scales.collect import collect
from act_scales.mean_squares import MeanSquares
from act_scales.store import ActScales, load_act_scales
from act_scales.text import Text
from smoothquant import batches, decoder, hidden, workroom
from smoothquant.errors import ActScalesError, MissingPackageError, OutputError, UserError
from smoothquant.journal import work_folder
from smoothquant.layers import float_layer
from smoothquant.model import Model
from tests.models import open_llama, sample_ids

VARIANTS = {
    "grouped heads": {},
    "full heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "one layer": {"num_hidden_layers": 1},
}


def text_of(*lengths: int) -> Text:
    return Text(tuple(sample_ids(1, length, seed)[0] for seed, length in enumerate(lengths)), "random")


def hooked(folder: Path, text: Text, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Maxima of |input| and |output| of every linear but lm_head, one sequence at a time, without any batching."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def listen(name: str) -> Callable:
        def hook(_module: object, args: tuple, output: torch.Tensor) -> None:
            for maxima, seen in ((inputs, args[0]), (outputs, output)):
                found = seen.float().abs().flatten(0, -2).amax(dim=0)
                maxima[name] = torch.maximum(maxima[name], found) if name in maxima else found

        return hook

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and name != "lm_head":
            part.register_forward_hook(listen(name))
    with torch.no_grad():
        for sequence in text.sequences:
            model(sequence[None])
    return inputs, outputs


def assert_close(found: ActScales, expected: tuple[dict, dict], tolerance: float) -> None:
    for mine, theirs in zip((found.input_absmax, found.output_absmax), expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            assert mine[name].dtype == torch.float32
            assert (mine[name] - values).abs().max() <= tolerance * values.max(), name


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
def test_mean_squares_weigh_every_token_alike(
    batch_tokens: int, llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hooks on transformers' model: sum of x^2 / |x|^2 over tokens, divided by the sum of 1 / |x|^2."""
    monkeypatch.setattr(batches, "BATCH_TOKENS", batch_tokens)
    text, seen = text_of(40, 40, 11), {}
    found = collect(llama, text, tmp_path / "a.safetensors", device="cpu").input_mean_square
    theirs = LlamaForCausalLM.from_pretrained(llama.checkpoint.folder, dtype=torch.float32)
    for name, part in theirs.named_modules():
        part.register_forward_hook(lambda _part, args, _y, name=name: seen.setdefault(name, []).append(args))
    with torch.no_grad():
        for sequence in text.sequences:
            theirs(sequence[None])
    for name, values in found.items():
        x = torch.cat([args[0].flatten(0, -2) for args in seen[name]]).double()
        weights = 1 / x.square().sum(dim=1, keepdim=True)
        expected = ((x.square() * weights).sum(dim=0) / weights.sum()).float()
        # as for the maxima: float32 rounding of two layers in another order, twice that in a square
        assert (values - expected).abs().max() <= 1e-5 * expected.max(), name


def test_a_token_of_zeros_counts_nothing(llama: Model) -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 20.0]])
    listener = MeanSquares(llama)
    listener.enter(float_layer(llama, 0))
    listener.listen("down", x, x)
    listener._last, name = None, "model.layers.0.mlp.down_proj"
    listener.found[name] = torch.zeros(2)
    listener.leave()
    # weights 1/4 and 1/400: (1 + 0) / .2525, (0 + 1) / .2525
    torch.testing.assert_close(listener.found[name], torch.full((2,), 1 / 0.2525))


def distance(found: tuple[Mapping, Mapping], exact: tuple[dict, dict]) -> float:
    """Root mean square, over all linears, of the relative error of a linear's maxima."""
    errors = [
        (mine[name] - values).norm() / values.norm()
        for mine, theirs in zip(found, exact, strict=True)
        for name, values in theirs.items()
    ]
    return torch.stack(errors).square().mean().sqrt().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_maxima_are_those_of_transformers(variant: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder, text = make_llama(**VARIANTS[variant]), text_of(48, 48, 48, 48, 7)
    found = collect(open_llama(folder), text, tmp_path / "a.safetensors", device="cpu")
    # float32 rounding, summed over two layers in another order: a few units of 1.2e-7
    assert_close(found, hooked(folder, text), 5e-6)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
def test_batches_do_not_matter(
    batch_tokens: int, llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", batch_tokens)
    text = text_of(40, 40, 40, 40, 40, 11)
    found = collect(llama, text, tmp_path / "a.safetensors", device="cpu")
    assert_close(found, hooked(llama.checkpoint.folder, text), 5e-6)  # as above


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_sixteen_bit_checkpoints(stored: torch.dtype, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder, text = make_llama(dtype=stored), text_of(48, 48)
    model = open_llama(folder)
    exact = hooked(folder, text)
    found = collect(model, text, tmp_path / "a.safetensors", dtype="float32", device="cpu")
    assert_close(found, exact, 5e-6)  # as above
    # in bfloat16 nobody is exact: as near to float32 as transformers' own bfloat16 is, with a quarter for chance
    found = collect(model, text, tmp_path / "b.safetensors", dtype="bfloat16", device="cpu")
    theirs = hooked(folder, text, torch.bfloat16)
    assert distance((found.input_absmax, found.output_absmax), exact) <= 1.25 * distance(theirs, exact)


# -- the file --------------------------------------------------------------------------------------------------------


def test_the_file_tells_what_it_was_made_from(llama: Model, tmp_path: Path) -> None:
    text, out = text_of(32, 32, 9), tmp_path / "a.safetensors"
    made = collect(llama, text, out, device="cpu")
    read = load_act_scales(out)
    assert read.fingerprint == made.fingerprint == made.for_model(llama).fingerprint
    assert read.metadata == made.metadata
    versions = json.loads(read.metadata["versions"])
    assert versions["torch"] == torch.__version__
    assert {key: value for key, value in read.metadata.items() if key != "versions"} == {
        "format_version": "3",
        "model_fingerprint": llama.checkpoint.fingerprint,
        "text_fingerprint": text.fingerprint,
        "text_source": "random",
        "samples": "3",
        "sequence_length": "32",
        "sequence_start": "",
        "tokens": "73",
        "dtype": "float32",
        "device": "cpu",
    }
    assert sorted(tmp_path.iterdir()) == [out]


def test_calibrating_twice_gives_the_same_bytes(llama: Model, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        collect(llama, text_of(48, 48, 5), tmp_path / name, device="cpu")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class Interrupt(KeyboardInterrupt):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize(("stop", "mapped"), [(1, False), (2, True), (3, False)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stop: int, mapped: bool, make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0)  # keep the state after every layer
    model, text, out = open_llama(make_llama(num_hidden_layers=4)), text_of(32, 32, 9), tmp_path / "a.safetensors"

    def interrupt(done: int, _total: int) -> None:
        if done == stop:
            raise Interrupt

    monkeypatch.setattr(hidden, "IN_MEMORY", 0 if mapped else 1 << 30)
    with pytest.raises(Interrupt):
        collect(model, text, out, device="cpu", progress=interrupt)
    monkeypatch.setattr(hidden, "IN_MEMORY", 1 << 30 if mapped else 0)  # it goes on where its states lie
    assert not out.exists()
    seen: list[int] = []
    collect(model, text, out, device="cpu", progress=lambda done, total: seen.append(done))
    assert seen == list(range(stop, 5))
    collect(model, text, tmp_path / "straight.safetensors", device="cpu")
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.s*")) == ["a.safetensors", "straight.safetensors"]


def test_a_broken_state_is_told_and_not_used(
    make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0)
    model, text, out = open_llama(make_llama()), text_of(32), tmp_path / "a.safetensors"

    def interrupt(done: int, _total: int) -> None:
        if done == 1:
            raise Interrupt

    with pytest.raises(Interrupt):
        collect(model, text, out, device="cpu", progress=interrupt)
    (state,) = work_folder(out).glob("state.*")
    os.truncate(state, 100)
    collect(model, text, out, device="cpu")
    assert [record.getMessage() for record in caplog.records] == [
        f"{out}: what an interrupted run left is damaged; it starts again"
    ]
    collect(model, text, tmp_path / "straight.safetensors", device="cpu")
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


def test_a_finished_file_is_reused(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = text_of(32, 32), tmp_path / "a.safetensors"
    made = collect(llama, text, out, device="cpu")
    monkeypatch.setattr(decoder, "forward", None)  # nothing is computed again
    assert collect(llama, text, out, device="cpu").fingerprint == made.fingerprint


def test_other_content_is_refused_unless_overwritten(llama: Model, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    collect(llama, text_of(32, 32), out, device="cpu")
    before = out.read_bytes()
    for text, dtype in ((text_of(32, 31), "auto"), (text_of(32, 32), "bfloat16")):
        with pytest.raises(OutputError, match=r"a\.safetensors exists and was not made.*--overwrite"):
            collect(llama, text, out, dtype=dtype, device="cpu")
    assert out.read_bytes() == before
    collect(llama, text_of(32, 31), out, device="cpu", overwrite=True)
    assert load_act_scales(out).metadata["tokens"] == "63"
    out.write_text("something precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists, and it is no act scales file of this tool"):
            collect(llama, text_of(32, 31), out, device="cpu", overwrite=overwrite)
    assert out.read_text() == "something precious"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_impossible_outputs_are_refused(llama: Model, tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").mkdir()
    for out in (tmp_path / "b.safetensors", tmp_path / "scales", tmp_path / "scales.pt"):
        with pytest.raises(OutputError, match=r"expected a file NAME\.safetensors"):
            collect(llama, text_of(32), out, device="cpu", overwrite=True)


# -- bad input -------------------------------------------------------------------------------------------------------


def poison(folder: Path, name: str, row: int, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        ("model.layers.1.post_attention_layernorm.weight", r"input of model\.layers\.1\.mlp\.gate_proj"),
        ("model.layers.0.mlp.up_proj.weight", r"output of model\.layers\.0\.mlp\.up_proj"),
        ("model.layers.1.self_attn.v_proj.weight", r"output of model\.layers\.1\.self_attn\.v_proj"),
    ],
)
def test_the_first_linear_with_nan_or_inf_is_named(
    tensor: str, fault: str, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder, text = make_llama(), text_of(40, 40)
    poison(folder, tensor, 5, 3e38)  # finite, and any sum with it is not
    with pytest.raises(ActScalesError, match=rf"NaN or Inf in the {fault}, the first linear") as caught:
        collect(open_llama(folder), text, tmp_path / "a.safetensors", device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.safetensors").exists()


def test_float16_that_overflows_says_what_to_do(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama()
    poison(folder, "model.layers.0.mlp.up_proj.weight", 5, 6e4)
    with pytest.raises(ActScalesError, match=r"up_proj.*expected activations that float16 can hold.*--dtype float32"):
        collect(open_llama(folder), text_of(40), tmp_path / "a.safetensors", dtype="float16", device="cpu")
    collect(open_llama(folder), text_of(40), tmp_path / "a.safetensors", dtype="float32", device="cpu")


def test_text_of_another_model_is_refused(llama: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer that came with the model"):
        collect(llama, Text((torch.tensor([1, 10**6]),), "t"), tmp_path / "a.safetensors", device="cpu")
    assert not list(tmp_path.iterdir())


def test_unknown_dtypes_and_devices_are_refused(llama: Model, tmp_path: Path) -> None:
    for options, error, fault in (
        ({"dtype": "int4"}, UserError, "dtype 'int4'; expected auto or one of float32, bfloat16, float16"),
        ({"device": "tpu"}, UserError, "device 'tpu'; expected auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, MissingPackageError, "device 'cuda:99' is not there"),
    ):
        with pytest.raises(error, match=fault):
            collect(llama, text_of(32), tmp_path / "a.safetensors", **options)
