"""Per-linear and per-layer errors against their formulas, and a spoiled linear found in its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from act_scales.text import Text
from builders.validate import Reference, read_scheme
from builders.validate.layers import NO_ERROR, LinearError, sqnr
from builders.validate.scheme import EngineScheme
from smoothquant.model import Model
from smoothquant.scheme import scheme_of
from tests.models import open_llama

NAIVE = EngineScheme("naive", scheme_of("per-token"))


def errors(model: Model, text: Text, scheme: EngineScheme) -> tuple[list[LinearError], list[float]]:
    (stream,) = Reference(model, text, [scheme]).streams.values()
    return stream.linears, stream.hidden_errors


def fake_quantize(values: torch.Tensor) -> torch.Tensor:
    """Symmetric INT8 by rows, in float64, by the plainest formula."""
    step = values.double().abs().amax(dim=-1, keepdim=True) / 127
    return (values.double() / step).round() * step


@pytest.mark.parametrize("name", ["w8a8", "naive"])
def test_sqnr_of_every_linear_is_its_formula(name: str, llama: Model, text: Text, folders: Path) -> None:
    scheme = read_scheme(folders / name)
    found = {linear.name: linear.sqnr for linear in errors(llama, text, scheme)[0]}
    powers = {linear: torch.zeros(2, dtype=torch.float64) for linear in found}
    model = LlamaForCausalLM.from_pretrained(llama.checkpoint.folder, dtype=torch.float32)
    rows = {v: scheme.smoothing_scale.get(o) for v, o in _feeds(llama)}

    def listen(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        x, scale, row = args[0][0], scheme.smoothing_scale.get(module.name), rows.get(module.name)
        s = torch.ones(x.shape[-1]) if scale is None else scale
        r = torch.ones(output.shape[-1]) if row is None else _row(llama, module.name, row)
        weight = module.weight.double() * s / r[:, None]
        y = fake_quantize(x / s) @ fake_quantize(weight).T
        true = output[0].double() / r
        powers[module.name] += torch.stack((true.square().sum(), (y - true).square().sum()))

    for module_name, module in model.named_modules():
        if module_name in found:
            module.name = module_name
            module.register_forward_hook(listen)
    with torch.no_grad():
        for ids in text.sequences:
            model(ids[None])
    for linear, (signal, noise) in powers.items():
        # float32 against float64: a value in 10^5 rounds the other way, 0.001 % of the noise; 0.01 dB is 0.2 %
        assert found[linear] == pytest.approx(10 * math.log10(signal / noise), abs=0.01), linear


def _feeds(model: Model) -> list[tuple[str, str]]:
    layers = range(model.geometry.layers)
    return [(model.linear(n, a), model.linear(n, b)) for n in layers for a, b in (("v", "o"), ("up", "down"))]


def _row(model: Model, name: str, scale: torch.Tensor) -> torch.Tensor:
    """The factor of a source's rows: a kv head's channels are shared by the two query heads that read it."""
    if name.endswith("up_proj"):
        return scale
    geometry = model.geometry
    heads = scale.view(geometry.kv_heads, -1, geometry.head_dim)
    assert heads[:, 0].equal(heads[:, 1])
    return heads[:, 0].flatten()


def test_smoothing_helps_where_the_outliers_are(llama: Model, text: Text, folders: Path) -> None:
    naive, smooth = (errors(llama, text, read_scheme(folders / name)) for name in ("naive", "w8a8"))
    for before, after in zip(naive[0], smooth[0], strict=True):
        if before.role in ("q", "k", "v", "gate", "up"):
            assert after.sqnr > before.sqnr + 6, before.name  # half the error, at the least
    assert smooth[1][-1] < naive[1][-1]


def test_error_of_the_first_hidden_state_is_its_formula(llama: Model, text: Text, folders: Path) -> None:
    """Against transformers twice: the float model, and the same with fake-quantized linears in its first layer."""
    scheme = read_scheme(folders / "naive")
    found = errors(llama, text, scheme)[1]
    model = LlamaForCausalLM.from_pretrained(llama.checkpoint.folder, dtype=torch.float64)

    @torch.no_grad()
    def hidden() -> list[torch.Tensor]:
        return [model(ids[None], output_hidden_states=True).hidden_states[1][0] for ids in text.sequences]

    reference = hidden()
    for module in model.model.layers[0].modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = fake_quantize(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (fake_quantize(args[0]),))
    squares = [((h - r).norm(dim=-1) / r.norm(dim=-1)).square() for h, r in zip(hidden(), reference, strict=True)]
    # a value in 10^5 rounds the other way: 1 % is far above what that moves
    assert found[0] == pytest.approx(torch.cat(squares).mean().sqrt().item(), rel=0.01)
    assert len(found) == 2


def test_a_spoiled_linear_is_seen_where_it_is(make_llama: Callable[..., Path], text: Text) -> None:
    """A huge weight on a channel that never moves takes all of a row's INT8 steps: the other weights become zeros."""
    folder = make_llama()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.post_attention_layernorm.weight"][5] = 0
    before = errors(_saved(folder, tensors), text, NAIVE)
    tensors["model.layers.1.mlp.gate_proj.weight"][:, 5] = 1e4
    after = errors(_saved(folder, tensors), text, NAIVE)
    spoiled = [linear for linear in after[0] if linear.sqnr < 1]
    assert [linear.name for linear in spoiled] == ["model.layers.1.mlp.gate_proj"]
    assert (spoiled[0].layer, spoiled[0].role) == (1, "gate")
    assert spoiled[0].sqnr == pytest.approx(0, abs=0.1)  # the error is the signal
    for untouched, same in zip(before[0], after[0], strict=True):
        if same.name != spoiled[0].name:
            assert same.sqnr == untouched.sqnr
    assert after[1][0] == before[1][0]
    assert after[1][1] > before[1][1]


def _saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Model:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_llama(folder)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"), [(1, 0.01, 20), (1, 0, NO_ERROR), (0, 1, -NO_ERROR), (0, 0, NO_ERROR)]
)
def test_sqnr_is_always_a_number(signal: float, noise: float, expected: float) -> None:
    assert sqnr(signal, noise) == pytest.approx(expected)
