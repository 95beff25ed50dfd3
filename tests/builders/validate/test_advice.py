"""A missed threshold comes with what to change, in the direction that what was measured tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from act_scales.text import Text
from builders.validate import Reference, Thresholds, Validation, read_scheme, validate_engines
from builders.validate.advice import advice
from exporters.export import Source, export
from exporters.huggingface import ModelOptWriter, SmoothedWriter
from smoothquant.model import Model
from smoothquant.outputs import load_manifest
from smoothquant.scheme import scheme_of
from smoothquant.settings import SmoothingSettings
from tests.builders.validate.test_layer_errors import fake_quantize
from tests.models import hooked_absmax, open_llama, sample_ids, save_llama
from tests.writers import w8a8_writer

ALPHAS = (0.05, 0.5, 0.95)
IMPOSSIBLE = Thresholds(kl_mean=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With outliers that have a cost wherever they are: those of the activations, 64, are 16 in the products."""
    folder = save_llama(tmp_path_factory.mktemp("model"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            tensor[:, 3::17] *= 16
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_llama(folder)


@pytest.fixture(scope="module")
def exports(llama: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W8A8 folders by alpha, per token; and static ones."""
    root, input_absmax = tmp_path_factory.mktemp("exports"), hooked_absmax(llama.checkpoint.folder, sample_ids())

    def source(alpha: float, groups: str = "paper") -> Source:
        fingerprints = {"model": llama.checkpoint.fingerprint}
        return Source(llama, SmoothingSettings(alpha, groups), input_absmax, fingerprints)

    for alpha in ALPHAS:
        export(source(alpha), [w8a8_writer(root / f"{alpha:g}", activations="per-token")])
    static = scheme_of("per-tensor")
    writers = [w8a8_writer(root / "static", activations="per-tensor"), ModelOptWriter(root / "modelopt", static)]
    export(source(0.05), [*writers, SmoothedWriter(root / "hf")])
    export(source(0.5, "none"), [w8a8_writer(root / "naive", activations="per-tensor")])
    return root


def validated(model: Model, text: Text, folder: Path, thresholds: Thresholds = IMPOSSIBLE) -> Validation:
    [found] = validate_engines({"it": folder}, model, text, {"it": thresholds}, device="cpu")
    return found


def rounded_weights_alone(model: Model, text: Text, folder: Path) -> float:
    """The share of rounded weights in the errors of smoothed linears, by rounding nothing else: hooks and float64."""
    scales = read_scheme(folder).smoothing_scale
    powers: dict[str, torch.Tensor] = {}

    def listen(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        scale = scales[module.name].double()
        x, weight = args[0][0].double() / scale, module.weight.double() * scale
        true = x @ weight.T
        errors = (x @ fake_quantize(weight).T - true, fake_quantize(x) @ fake_quantize(weight).T - true)
        found = torch.stack([part.square().sum() for part in (true, *errors)])
        powers[module.name] = powers.get(module.name, 0) + found

    theirs = LlamaForCausalLM.from_pretrained(model.checkpoint.folder, dtype=torch.float32)
    for name, module in theirs.named_modules():
        if name in scales:
            module.name = name
            module.register_forward_hook(listen)
    with torch.no_grad():
        for ids in text.sequences:
            theirs(ids[None])
    alone, both = (sum(found[place] / found[0] for found in powers.values()) for place in (1, 2))
    return (alone / both).item()


def test_the_share_of_rounded_weights_is_that_of_rounding_nothing_else(llama: Model, text: Text, exports: Path) -> None:
    shares = []
    for alpha in ALPHAS:
        scheme = read_scheme(exports / f"{alpha:g}")
        [stream] = Reference(llama, text, [scheme]).streams.values()
        shares.append(stream.weight_share)
        true = rounded_weights_alone(llama, text, exports / f"{alpha:g}")
        # weights below half a step become 0, and lose less than a uniform error: here up to 17 %
        assert 0.97 * true < shares[-1] < 1.2 * true
    assert shares[0] < 0.2 < 0.8 < shares[-1]  # the control: what is measured differs by more than that


def test_alpha_is_to_move_to_where_less_is_lost(llama: Model, text: Text, exports: Path) -> None:
    low, middle, high = (validated(llama, text, exports / f"{alpha:g}") for alpha in ALPHAS)
    assert middle.metrics.kl_mean < min(low.metrics.kl_mean, high.metrics.kl_mean)  # the advice is right
    assert low.advice.startswith("a greater --alpha than 0.05, since ")
    assert low.advice.endswith("% of the error is that of activations")
    assert high.advice.startswith("a smaller --alpha than 0.95, since ")
    assert high.advice.endswith("% of the error is that of weights")
    assert low.verdict.endswith(f" would have passed; try {low.advice}")


def test_static_activations_have_more_to_try(llama: Model, text: Text, exports: Path) -> None:
    found = {name: validated(llama, text, exports / name) for name in ("static", "modelopt", "naive")}
    worst = next(iter({linear.role for linear in found["static"].worst[:1]}))
    assert found["static"].advice.startswith(f"--act per-token instead of per-tensor; or --keep-float {worst}")
    assert "; or a greater --alpha than 0.05, since " in found["static"].advice
    assert found["modelopt"].advice.startswith("--keep-float ")  # it has no other activations
    assert found["naive"].advice.endswith("; or smoothing, without --groups none")


@pytest.mark.parametrize(("alpha", "more"), [(0.8, True), (0.85, False)])
def test_no_alpha_beyond_the_greatest_that_helps_is_advised(alpha: float, more: bool, exports: Path) -> None:
    manifest = load_manifest(exports / "static")
    inputs = {**manifest.inputs, "smoothing": {**manifest.inputs["smoothing"], "alpha": alpha}}
    assert ("greater --alpha" in advice(replace(manifest, inputs=inputs), (), 0.1)) == more


def test_what_passes_or_is_float_needs_no_advice(llama: Model, text: Text, exports: Path) -> None:
    passing = validated(llama, text, exports / "static", Thresholds(kl_mean=1e9))
    assert (passing.passed, passing.advice) == (True, "")
    assert "try" not in passing.verdict
    assert validated(llama, text, exports / "hf").advice == ""
    assert Validation.from_dict(passing.as_dict()) == passing
