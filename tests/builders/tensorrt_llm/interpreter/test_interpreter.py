"""Checkpoints of every architecture, mode and sharding, run by the interpreter and by transformers.

The two share nothing: the checkpoint is written by `checkpoints.py`, and `reference.py` puts the same int8 numbers
into transformers' own models. In float64 both must agree to what the file's float32 scales round. A number that falls
half-way between two integers may go either way in the two: sequences are short and many, and most must be untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from builders.tensorrt_llm import EnginePrecision, Interpreter, check
from builders.tensorrt_llm.format.findings import errors
from smoothquant.errors import UserError
from tests.builders.tensorrt_llm import reference
from tests.builders.tensorrt_llm.checkpoints import ALGORITHMS, PER_TOKEN, write
from tests.zoo import build

EXACT = EnginePrecision(torch.float64)
LAYOUTS = (
    "llama",
    "llama-tied",
    "llama-biased",
    "llama-scaled",
    "mistral-nemo",
    "qwen2",
    "bloom",
    "bloom-6-heads",
    "falcon-7b",
    "falcon-40b",
    "falcon-11b",
    "falcon-rw",
    "opt",
)
TOLERANCE = 5e-7  # of logits: the float32 scales in the file
STATIC = "W8A8_SQ_PER_TENSOR_PLUGIN"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 256, (32, 6), generator=torch.Generator().manual_seed(3))


def errors_of_sequences(found: Tensor, expected: Tensor) -> Tensor:
    """Relative error of every sequence's logits, (batch,)."""
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def assert_same(found: Tensor, expected: Tensor) -> None:
    error = errors_of_sequences(found, expected)
    assert (error <= TOLERANCE).double().mean() >= 0.9, error.tolist()
    assert error.max() < 0.2, error.tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_mode(layout: str, algorithm: str | None, ids: Tensor, tmp_path: Path) -> None:
    if layout == "opt" and str(algorithm).endswith("PER_TOKEN_PLUGIN"):
        pytest.skip("no engine takes it; see test_check")
    model = build(layout)
    written = write(model, tmp_path, algorithm)
    assert not errors(check(tmp_path))
    found = Interpreter(tmp_path, EXACT).logits(ids)
    assert_same(found, reference.logits(reference.quantized(model, written), ids))


@pytest.mark.parametrize("algorithm", [PER_TOKEN, STATIC, "W8A8_SQ_PER_CHANNEL", None])
@pytest.mark.parametrize(
    ("layout", "tp", "pp", "kv_cache", "parallel_embedding", "changes"),
    [
        ("llama", 2, 1, None, 0, {}),
        ("llama", 4, 2, "INT8", 1, {}),  # 2 KV heads on 4 ranks: repeated
        ("llama", 1, 2, "INT8", None, {}),
        ("llama-biased", 4, 1, None, None, {}),
        ("llama-tied", 4, 1, None, 0, {"vocab_size": 285}),  # padded to 288
        ("qwen2", 4, 2, None, None, {}),
        ("falcon-7b", 4, 2, None, None, {}),
        ("falcon-40b", 4, 1, "INT8", 0, {}),
        ("falcon-rw", 2, 1, None, None, {}),
        ("bloom", 2, 2, "INT8", 0, {}),
        ("opt", 2, 2, None, None, {}),
    ],
)
def test_shards(
    layout: str,
    tp: int,
    pp: int,
    kv_cache: str | None,
    parallel_embedding: int | None,
    changes: dict,
    algorithm: str | None,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    """Per token, every rank quantizes its own channels of dense's and proj's input, as an engine's ranks do."""
    if layout == "opt" and algorithm == PER_TOKEN:
        pytest.skip("no engine takes it; see test_check")
    model = build(layout, **changes)
    written = write(model, tmp_path, algorithm, tp=tp, pp=pp, kv_cache=kv_cache, parallel_embedding=parallel_embedding)
    assert not errors(check(tmp_path))
    found = Interpreter(tmp_path, EXACT).logits(ids)
    kv_scales = written.kv_scales if kv_cache else None
    assert_same(found, reference.logits(reference.quantized(model, written), ids, kv_scales))


def test_a_window(ids: Tensor, tmp_path: Path) -> None:
    """config.json has no place for it; with it, an engine's logits are those of transformers."""
    model = build("mistral", sliding_window=3)
    write(model, tmp_path, None)
    interpreter, wanted = Interpreter(tmp_path, EXACT), reference.logits(reference.exact(model), ids)
    assert errors_of_sequences(interpreter.logits(ids), wanted).min() > 1e-3
    interpreter.config = replace(interpreter.config, window=model.config.sliding_window)
    assert_same(interpreter.logits(ids), wanted)


@pytest.mark.parametrize("algorithm", [PER_TOKEN, STATIC, None])
def test_gpt2(algorithm: str | None, ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    numbers = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 288, "n_positions": 64, "initializer_range": 0.1}
    model = GPT2LMHeadModel(GPT2Config(**numbers)).eval()
    written = write(model, tmp_path, algorithm)
    found = Interpreter(tmp_path, EXACT).logits(ids)
    if algorithm is None:
        assert_same(found, reference.logits(reference.exact(model), ids))
        return
    for linear in written.linears.values():  # Conv1D is no Linear: dequantize by hand, and see that 8 bits cost little
        assert all(q.abs().max() == 127 for q in linear.q)
    error = errors_of_sequences(found, reference.logits(reference.exact(model), ids))
    assert 1e-3 < error.mean() < 0.2


@pytest.mark.parametrize("algorithm", [PER_TOKEN, STATIC])
def test_float32_is_float64_but_for_ties(algorithm: str, ids: Tensor, tmp_path: Path) -> None:
    write(build("llama"), tmp_path, algorithm)
    exact, single = (Interpreter(tmp_path, precision).logits(ids) for precision in (EXACT, EnginePrecision()))
    assert single.dtype == torch.float32
    error = errors_of_sequences(single.double(), exact)
    assert (error < 1e-5).double().mean() > 0.5
    assert error.max() < 0.3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["llama", "bloom", "falcon-40b"])
def test_activations_in_the_dtype_of_the_engine(layout: str, dtype: str, ids: Tensor, tmp_path: Path) -> None:
    """Rounded wherever a kernel writes them: without quantization, as near as transformers in that dtype is."""
    model = build(layout, outlier=1).to(getattr(torch, dtype)).float()
    write(model, tmp_path, None, dtype=dtype)
    expected = reference.logits(reference.exact(model), ids)
    held = Interpreter(tmp_path, EnginePrecision(torch.float32, getattr(torch, dtype))).logits(ids)
    theirs = model.to(getattr(torch, dtype))(ids).logits.double()
    error, their_error = (errors_of_sequences(x.double(), expected).mean() for x in (held, theirs))
    assert their_error / 4 < error < 2 * their_error


def test_w8a8_with_float16_activations_stays_near(ids: Tensor, tmp_path: Path) -> None:
    model = build("llama", outlier=1)
    write(model, tmp_path, PER_TOKEN)
    exact = Interpreter(tmp_path, EXACT).logits(ids)
    held = Interpreter(tmp_path, EnginePrecision(torch.float32, torch.float16)).logits(ids)
    expected = reference.logits(reference.exact(model), ids)
    quantization = errors_of_sequences(exact, expected).mean()
    assert errors_of_sequences(held.double(), exact).mean() < quantization


def test_a_tied_head_may_be_left_out(ids: Tensor, tmp_path: Path) -> None:
    write(build("llama-tied"), tmp_path)
    expected = Interpreter(tmp_path).logits(ids)
    without(tmp_path, "lm_head.weight")
    assert Interpreter(tmp_path).logits(ids).equal(expected)


def test_scalars_without_dimensions(ids: Tensor, tmp_path: Path) -> None:
    """BLOOM's and GPT-2's converters write them so."""
    write(build("bloom"), tmp_path, STATIC)
    expected = Interpreter(tmp_path).logits(ids)
    path = tmp_path / "rank0.safetensors"
    tensors = load_file(path)
    save_file({name: value.squeeze() if value.numel() == 1 else value for name, value in tensors.items()}, path)
    assert not errors(check(tmp_path))
    assert Interpreter(tmp_path).logits(ids).equal(expected)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: without(folder, "transformer.ln_f.weight"), "no tensor transformer.ln_f.weight"),
        (lambda folder: (folder / "rank0.safetensors").unlink(), "no such file"),
        (lambda folder: (folder / "rank0.safetensors").write_bytes(b"x" * 50), "truncated or corrupt"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "no such file"),
    ],
)
def test_broken_folders(spoil: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    write(build("llama"), tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=said):
        Interpreter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "swish-2"}, "hidden_act 'swish-2'; expected one of silu"),
        ({"architecture": "MambaForCausalLM"}, "'MambaForCausalLM' is not known here; expected one of LlamaFor"),
        ({"intermediate_size": 64}, r"tensor transformer.layers.0.mlp.fc.weight has shape \[128, 64\]"),
        ({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, "kv_cache_scaling_factor"),
    ],
)
def test_configs_that_do_not_fit(changes: dict, said: str, tmp_path: Path) -> None:
    write(build("llama"), tmp_path, None, **changes)
    with pytest.raises(UserError, match=said):
        Interpreter(tmp_path)


@pytest.mark.parametrize("layout", ["falcon-40b", "bloom", "opt"])
def test_norms_that_are_given_no_epsilon(layout: str, ids: Tensor, tmp_path: Path) -> None:
    """Have that of NVIDIA's LayerNorm, whatever config.json says; `check` says so."""
    model = build(layout)
    for name, epsilon in (("usual", 1e-5), ("other", 0.5)):
        write(model, tmp_path / name, None, norm_epsilon=epsilon)
    assert check(tmp_path / "usual") == []
    [finding] = check(tmp_path / "other")
    assert "norm_epsilon" in finding.sentence
    if layout == "falcon-40b":
        for layer in model.transformer.h:
            layer.ln_attn.eps = layer.ln_mlp.eps = 0.5  # these are given it; ln_f is not
    expected = reference.logits(reference.exact(model), ids)
    assert_same(Interpreter(tmp_path / "other", EXACT).logits(ids), expected)


def without(folder: Path, tensor: str) -> None:
    path = folder / "rank0.safetensors"
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path)


def test_more_tokens_than_learned_positions(tmp_path: Path) -> None:
    model: PreTrainedModel = build("opt")
    write(model, tmp_path, None)
    with pytest.raises(UserError, match="a sequence of 129 tokens; expected at most 128"):
        Interpreter(tmp_path).logits(torch.zeros(1, 129, dtype=torch.int64))
