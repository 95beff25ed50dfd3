"""Engines, real and fake, against the reference: from folders to results in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from act_scales.text import Text
from builders.validate import Reference, Thresholds, Validation, read_scheme, validate, validate_engines
from builders.validate.scheme import EngineScheme
from smoothquant.artifacts.manifest import Manifest
from smoothquant.errors import ThresholdError, UserError
from smoothquant.model import Model
from smoothquant.outputs import FORMAT
from smoothquant.quantization import quantize_tokens, quantize_weight
from smoothquant.scheme import scheme_of
from tests.models import open_llama
from tests.outputs import made_from

FLOAT = EngineScheme("float", scheme_of("float"))


class FakeEngine:
    """Gives what `compute` makes of the reference's logits of the same sequence."""

    def __init__(self, reference: Reference, compute: Callable[[Tensor], Tensor], **inputs: str) -> None:
        made = made_from("float", **({"model": reference.fingerprint} | inputs))
        self.manifest = Manifest(FORMAT, "fake", {"export": made}, {}, {})
        self.reference, self.compute = reference, compute

    def logits(self, ids: Tensor) -> Tensor:
        sequences = self.reference.text.sequences
        index = next(n for n, sequence in enumerate(sequences) if sequence.equal(ids[0]))
        return self.compute(self.reference.logits(index))[None]


@pytest.fixture(scope="module")
def reference(llama: Model, text: Text) -> Reference:
    return Reference(llama, text)


def test_an_engine_that_is_the_reference(reference: Reference) -> None:
    found = validate(FakeEngine(reference, lambda logits: logits), reference, FLOAT)
    metrics = found.metrics
    assert (metrics.relative_error, metrics.max_abs_difference, metrics.kl_mean, metrics.kl_p99) == (0, 0, 0, 0)
    assert (metrics.top1, metrics.perplexity_ratio, metrics.tokens, metrics.predicted) == (1, 1, 143, 139)
    assert metrics.cosine == pytest.approx(1, rel=1e-12)
    assert (found.linears, found.hidden_errors, found.exactness, found.checks) == ((), (), None, ())


def test_an_engine_that_is_off_by_a_known_amount(reference: Reference) -> None:
    found = validate(FakeEngine(reference, lambda logits: 1.25 * logits), reference, FLOAT)
    assert found.metrics.relative_error == pytest.approx(0.25, rel=1e-6)  # float32 products
    assert found.metrics.top1 == 1
    limits = Thresholds(relative_error=0.2, top1=0.99)
    missed = validate(FakeEngine(reference, lambda logits: 1.25 * logits), reference, FLOAT, limits, label="mine")
    assert not missed.passed
    assert missed.verdict.startswith("mine: relative error of the logits is 0.25, at most 0.2 wanted: missed")
    assert "top-1" not in missed.verdict


def test_another_model_is_refused(reference: Reference) -> None:
    engine = FakeEngine(reference, lambda logits: logits, model="0123")
    with pytest.raises(UserError, match=rf"made from model 0123; expected {reference.fingerprint}"):
        validate(engine, reference, FLOAT)


def test_another_vocabulary_is_refused(reference: Reference) -> None:
    with pytest.raises(UserError, match="vocabulary of 287; expected 288"):
        validate(FakeEngine(reference, lambda logits: logits[:, 1:]), reference, FLOAT)


def test_a_nan_is_told_by_its_first_position(reference: Reference, text: Text) -> None:
    def spoil(logits: Tensor) -> Tensor:
        if len(logits) == len(text.sequences[2]):
            logits[11, 42] = logits[12, 1] = float("nan")
        return logits

    with pytest.raises(ThresholdError, match="sequence 2, token 11, entry 42"):
        validate(FakeEngine(reference, spoil), reference, FLOAT)


def test_a_reference_without_the_scheme_is_a_defect(reference: Reference, folders: Path) -> None:
    with pytest.raises(ValueError, match="without this engine's scheme"):
        validate(FakeEngine(reference, lambda logits: logits), reference, read_scheme(folders / "w8a8"))


def test_every_folder_of_ours_in_one_pass(llama: Model, text: Text, folders: Path) -> None:
    """Smoothed float is the model; W8A8 is near it; smoothing brings it nearer, static or not."""
    seen: list[tuple[int, int]] = []
    labels = ("hf", "w8a8", "static", "naive")
    limits = {"w8a8": Thresholds(kl_mean=1e-9, top1=0.0)}
    found = validate_engines(
        {label: folders / label for label in labels},
        llama,
        text,
        limits,
        progress=lambda done, total: seen.append((done, total)),
    )
    by_label = {validation.label: validation for validation in found}
    assert tuple(by_label) == labels
    error = {label: validation.metrics.relative_error for label, validation in by_label.items()}
    assert error["hf"] <= 1e-5  # the contract of smoothing
    assert 1e-3 < error["w8a8"] < error["static"]
    assert error["w8a8"] < error["naive"] / 2
    assert [check.passed for check in by_label["w8a8"].checks] == [False, True]
    assert (len(by_label["w8a8"].linears), len(by_label["hf"].linears)) == (14, 0)
    total = 2 + 4 * 4
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_ranges_before_and_after_smoothing(llama: Model, text: Text, folders: Path) -> None:
    smooth, naive = validate_engines({label: folders / label for label in ("w8a8", "naive")}, llama, text)
    scheme = read_scheme(folders / "w8a8")
    absmax = Reference(llama, text).act_absmax
    for found in smooth.ranges:
        name = llama.linear(found.layer, found.roles[0])
        after = absmax[name] / scheme.smoothing_scale[name]
        assert found.before_max == absmax[name].max().item()
        assert (found.after_max, found.after_median) == (after.max().item(), after.median().item())
    assert [(r.before_max, r.before_median) for r in smooth.ranges] == [
        (r.after_max, r.after_median) for r in naive.ranges
    ]
    assert smooth.channels.roles in (("q", "k", "v"), ("gate", "up"))  # where the tiny model has its outliers
    outliers = [n for n, value in enumerate(smooth.channels.before) if value > 10 * sorted(smooth.channels.before)[32]]
    assert set(outliers) == set(range(3, 64, 17))
    assert smooth.channels.count == 64


def test_exactness_tells_integer_engines_from_others(llama: Model, text: Text, folders: Path) -> None:
    """transformers rounds static activations as we do, and dynamic ones to another grid."""
    static, dynamic = validate_engines(
        {label: folders / label for label in ("static", "w8a8")}, llama, text, exact=True
    )
    assert static.exactness is not None
    assert dynamic.exactness is not None
    # one flip of the 10^5 roundings is about 1 % of the quantization error (3.4 / sqrt(10^5)); a handful may happen
    assert static.exactness.engine < 0.05 * static.metrics.relative_error
    assert dynamic.exactness.engine > 0.3 * dynamic.metrics.relative_error
    assert dynamic.exactness.pytorch < 0.05 * dynamic.metrics.relative_error


def test_exactness_of_pytorch_itself(llama: Model, text: Text, folders: Path) -> None:
    """An engine that gives PyTorch's own W8A8 logits is as far from the exact ones as PyTorch: ratio 1."""
    scheme = read_scheme(folders / "w8a8")
    reference = Reference(llama, text, [scheme], exact=True)
    lengths = [len(ids) for ids in text.sequences]
    for dtype, expected in ((torch.float32, 1.0), (torch.float64, 0.0)):
        engine = FakeEngine(reference, lambda logits: logits)
        order = iter(range(len(lengths)))
        engine.logits = lambda ids, order=order, dtype=dtype: reference.w8a8_logits(scheme, next(order), dtype)[None]
        found = validate(engine, reference, scheme, Thresholds(exactness_ratio=1.5))
        assert found.exactness is not None
        assert found.exactness.ratio == expected
        assert found.passed


def test_a_limit_on_exactness_asks_for_the_exact_pass(llama: Model, text: Text, folders: Path) -> None:
    limits = {"static": Thresholds(exactness_ratio=1e9)}
    (found,) = validate_engines({"static": folders / "static"}, llama, text, limits)
    assert found.exactness is not None
    assert found.checks[0].value == found.exactness.ratio


def test_int8_head_is_part_of_the_exact_model(llama: Model, text: Text, folders: Path) -> None:
    scheme = replace(read_scheme(folders / "w8a8"), scheme=scheme_of("per-token", head="int8"))
    reference = Reference(llama, text, [scheme], exact=True)
    found = reference.w8a8_logits(scheme, 2, torch.float64)
    state = reference.hidden(2, reference.streams[scheme.key].form(torch.float64))
    normed = state / (state.square().mean(-1, keepdim=True) + llama.geometry.norm_epsilon).sqrt()
    normed = normed * llama.read("model.norm.weight").double()
    integers, token_scale = quantize_tokens(normed)
    weight, weight_scale = quantize_weight(llama.read("lm_head.weight"))
    expected = integers @ weight.double().T * token_scale * weight_scale.double()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # float64, or a flip: 1e-3


def test_results_survive_json(llama: Model, text: Text, folders: Path) -> None:
    limits = {"static": Thresholds(kl_mean=0.1, exactness_ratio=1.5)}
    for found in validate_engines({"static": folders / "static", "hf": folders / "hf"}, llama, text, limits):
        content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
        assert Validation.from_dict(content) == found
        assert content["passed"] == found.passed
        assert [check["sentence"] for check in content["checks"]] == [check.sentence for check in found.checks]


def test_folders_are_checked_before_the_work(folders: Path, text: Text, make_llama: Callable[..., Path]) -> None:
    other = open_llama(make_llama(seed=7))
    with pytest.raises(UserError, match="made from model"):
        validate_engines({"w8a8": folders / "w8a8"}, other, text, progress=lambda done, total: pytest.fail("worked"))
    with pytest.raises(UserError, match="not an output of this tool"):
        validate_engines({"model": other.checkpoint.folder}, other, text)


def test_same_scheme_is_computed_once(llama: Model, text: Text, folders: Path) -> None:
    one, two = validate_engines({"one": folders / "w8a8", "two": folders / "w8a8"}, llama, text)
    assert one.linears == two.linears
    assert replace(one, label="two") == two
