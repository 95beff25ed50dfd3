"""The benchmark on real weights, on a tiny model made on the spot: its measures, intervals, pieces and refusals."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from act_scales.collect import collect
from act_scales.store import ActScales
from act_scales.text import Text
from builders.validate.metrics import Comparison
from builders.validate.perplexity import perplexities
from smoothquant.errors import UserError
from smoothquant.layers import FloatLayer, float_layer
from smoothquant.model import Model
from smoothquant.quantization import input_scale, quantize_tensor, quantize_tokens
from smoothquant.reading import read_json
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import smooth_layer
from smoothquant.workspace import Workspace
from tests.benchmarks import llm_compressor_folders, real_table, real_weights
from tests.benchmarks.real_forms import RECIPE, Form, recipe_alpha, settings_of
from tests.benchmarks.real_measures import Predictions, Results, difference, read_results
from tests.benchmarks.real_weights import Job, measure, run
from tests.int8_folders import save_compressed_tensors
from tests.models import open_llama, sample_ids

SEQUENCES = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 100), st.integers(1, 1000)), min_size=1, max_size=40
).map(lambda rows: tuple(zip(*rows, strict=True)))
FEW = 200  # resamples
PIECE = ("per-token-0.6", "per-tensor-auto")


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(tuple(sample_ids(6, 40, seed=2)), "calibration")


@pytest.fixture(scope="module")
def heldout() -> Text:
    return Text(tuple(sample_ids(5, 32, seed=3)), "held out")


@pytest.fixture(scope="module")
def scales(llama: Model, text: Text, tmp_path_factory: pytest.TempPathFactory) -> ActScales:
    return collect(llama, text, tmp_path_factory.mktemp("scales") / "it.safetensors")


@pytest.fixture
def job(llama: Model, text: Text, heldout: Text, tmp_path: Path) -> Job:
    return Job(llama, text, heldout, {}, together=4, out=tmp_path)


@given(SEQUENCES)
def test_a_form_does_not_differ_from_itself(rows: tuple) -> None:
    one, _, weights = rows
    assert difference(one, one, weights, FEW) == (0, 0, 0)


@given(SEQUENCES)
def test_the_interval_of_two_forms_is_that_of_the_reverse(rows: tuple) -> None:
    one, other, weights = rows
    estimate, low, high = difference(one, other, weights, FEW)
    back = difference(other, one, weights, FEW)
    assert back == pytest.approx((-estimate, -high, -low), abs=1e-9)
    assert low <= high


@given(SEQUENCES)
def test_the_interval_lies_within_what_single_sequences_differ(rows: tuple) -> None:
    one, other, weights = rows
    single = [(a - b) / weight for a, b, weight in zip(one, other, weights, strict=True)]
    for value in difference(one, other, weights, FEW):
        assert min(single) - 1e-9 <= value <= max(single) + 1e-9


@given(st.floats(-10, 10), st.lists(st.integers(1, 100), min_size=1, max_size=20))
def test_a_difference_that_all_tokens_share_is_certain(shift: float, weights: list[int]) -> None:
    one = [shift * weight for weight in weights]
    assert difference(one, [0.0] * len(one), weights, FEW) == pytest.approx((shift,) * 3, abs=1e-9)


def test_an_interval_is_as_wide_as_the_spread_says() -> None:
    """Of 64 differences with spread 1, the interval reaches 1.96 / 8 to either side; their noise is paired away."""
    noise, apart = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    apart = (apart - apart.mean()) / apart.std() + 0.5
    estimate, low, high = difference((100 * noise + apart).tolist(), (100 * noise).tolist(), [1] * 64)
    assert estimate == pytest.approx(0.5)
    assert (low, high) == pytest.approx((0.5 - 1.96 / 8, 0.5 + 1.96 / 8), abs=0.02)


def test_measures_are_those_of_a_validation() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(7, 300_000, generator=generator) * 3
    engine = reference + torch.randn(reference.shape, generator=generator) * 0.3
    ids = torch.randint(0, 300_000, (7,), generator=generator)
    comparison = Comparison(7)
    comparison.add(reference, engine, ids)
    expected = comparison.metrics()
    predictions = Predictions(reference, ids)
    kl, loss, agreeing = predictions.compare(engine)
    assert kl / 7 == pytest.approx(expected.kl_mean, rel=1e-4)
    assert agreeing / 7 == pytest.approx(expected.top1)
    assert math.exp(predictions.loss / 6) == pytest.approx(expected.reference_perplexity, rel=1e-4)
    assert math.exp(loss / 6) == pytest.approx(expected.perplexity, rel=1e-4)


def test_all_rows_of_a_model(job: Job, scales: ActScales, tmp_path: Path) -> None:
    """One row's perplexity is that of another measurement; the file is read back as it was."""
    found = run(job, "a command")
    assert list(found.forms) == [setting.name for setting in settings_of(job.model)]
    assert all(0 <= found.kl(form) < 1 for form in found.forms.values())
    assert read_results(job.path, job.identity, "") == found
    assert read_json(job.path)["command"] == "a command"
    smoothing = SmoothingSettings(recipe_alpha(job.model))
    with Workspace(tmp_path / "work", "test", {}) as work:
        known = perplexities(job.model, job.heldout, scales.input_absmax, smoothing, work)
    assert found.perplexity == pytest.approx(known.plain, rel=1e-5)
    assert found.perplexity_ratio(found.forms[RECIPE]).estimate == pytest.approx(known.w8a8 / known.plain, rel=1e-5)
    assert found.forms["per-tensor-25%"].share == pytest.approx(0.25, abs=0.15)
    assert found.forms["exact-weights-0.6"].share is None


def test_a_table_is_made_in_pieces(job: Job) -> None:
    """Forms give the same measures alone as beside others; a later piece replaces its rows and keeps the rest."""
    whole = run(job, "all")
    job.path.unlink()
    for name in PIECE:
        found = run(replace(job, rows=(name,)), "a piece")
    assert found.forms == {name: whole.forms[name] for name in PIECE}
    spoilt = found.with_forms({PIECE[0]: replace(found.forms[PIECE[0]], label="old")})
    real_weights.store(job.path, "old", [], spoilt.as_details())
    assert run(replace(job, rows=PIECE[:1]), "again") == found


def test_pieces_of_something_else_are_refused(job: Job, heldout: Text) -> None:
    run(replace(job, rows=PIECE), "a piece")
    before = job.path.read_bytes()
    other = replace(job, heldout=replace(heldout, sequences=heldout.sequences[:2]))
    with pytest.raises(UserError, match=r"holds results of text .* one held-out text in a file; .* measure all rows"):
        run(replace(other, rows=PIECE), "a piece")
    assert job.path.read_bytes() == before
    assert len(run(other, "all").lengths) == 2  # all rows begin a new file


def test_what_an_interrupted_run_measured_is_kept(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(*arguments: object) -> tuple:
        monkeypatch.setattr(real_weights, "measure", interrupted)
        return measure(*arguments)  # type: ignore[arg-type]

    def interrupted(*_arguments: object) -> tuple:
        raise KeyboardInterrupt

    monkeypatch.setattr(real_weights, "measure", once)
    with pytest.raises(KeyboardInterrupt):
        run(job, "a command")
    found = read_results(job.path, job.identity, "")
    assert found is not None
    assert len(found.forms) == job.together


def test_folders_of_other_tools_are_rows(job: Job, tmp_path: Path) -> None:
    folder = save_compressed_tensors(job.model.checkpoint.folder, tmp_path / "int8")
    both = replace(job, folders={"another tool": folder}, rows=("per-token-naive", "another tool"))
    naive, theirs = run(both, "a command").forms.values()
    assert (theirs.label, theirs.share) == ("another tool", 0)
    assert sum(theirs.kl) == pytest.approx(sum(naive.kl), rel=0.02)  # the same numbers, but for the order of a division


@pytest.mark.parametrize("alpha", [0.6, 0.8])
def test_floors_round_one_side_alone(alpha: float, llama: Model, scales: ActScales) -> None:
    """Together both sides make the whole."""
    forms = {setting.name: setting for setting in settings_of(llama)}
    source, x = float_layer(llama, 1), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    integers, token_scale = quantize_tokens(x)
    both, weights, activations = (
        forms[name].form(llama, scales).layer(llama, 1, source)
        for name in (f"per-token-{alpha}", f"exact-weights-{alpha}", f"exact-activations-{alpha}")
    )
    smoothed = smooth_layer(llama, 1, scales.input_absmax, SmoothingSettings(alpha))
    for role in ("q", "gate"):
        rounded = activations.linear(role, integers * token_scale)
        torch.testing.assert_close(both.linear(role, x), rounded, rtol=1e-4, atol=1e-5)
        exact = smoothed.linear(role, integers * token_scale)
        torch.testing.assert_close(weights.linear(role, x), exact)
        assert (exact - rounded).norm() > 1e-4 * exact.norm()


def test_the_floor_of_static_scales(llama: Model, scales: ActScales) -> None:
    """Inputs of INT8 linears by their one scale, of others as they are; no weight is rounded."""
    setting = next(setting for setting in settings_of(llama) if setting.name == "exact-weights-static")
    setting = replace(setting, keep_float="down")
    found = setting.form(llama, scales).layer(llama, 1, float_layer(llama, 1))
    smoothed = smooth_layer(llama, 1, scales.input_absmax, setting.smoothing)
    for role, channels in (("q", 64), ("down", 128)):
        x = torch.randn(3, channels, generator=torch.Generator().manual_seed(0))
        integers, scale = quantize_tensor(x, input_scale(smoothed.input_absmax[role]))
        read = x if role == "down" else integers * scale
        torch.testing.assert_close(found.linear(role, x), smoothed.linear(role, read))


def test_a_form_of_ones_own(llama: Model, heldout: Text) -> None:
    """The stored layers as a form: no error at all."""
    _, found = measure(llama, heldout, [Form("it", "as stored", lambda _model, _index, source: source)])
    assert sum(found["it"].kl) < 1e-6
    assert sum(found["it"].agreeing) == heldout.tokens


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rows", "per-token-0.55"), "row 'per-token-0.55'; expected of per-token-recipe, "),
        (("--rows", "per-token-0.6", "--together", "0"), "0 forms together; expected at least 1"),
        (("--folder", "label"), "--folder label; expected LABEL=FOLDER"),
        (("--folder", "it=nowhere", "--rows", RECIPE), "row 'it': a label that --rows does not name"),
        (("--folder", f"{RECIPE}=nowhere"), f"row {RECIPE!r}: the label of another row"),
        (("--folder", "it=nowhere"), "nowhere"),
        (("--length", "100000"), "sequences of "),
        (("--text", "nothing.txt"), "nothing.txt"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...], said: str, job: Job, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ = ("--model", str(job.model.checkpoint.folder), "--text", str(text_file), "--heldout", str(text_file))
    few = ("--samples", "3", "--length", "32", "--calibrate", "4", "--out", str(job.out))
    monkeypatch.setattr(sys, "argv", ["real_weights", *given_, *few, *words])
    with pytest.raises(SystemExit) as found:
        real_weights.main()
    assert said in str(found.value)
    assert "\n" not in str(found.value)
    assert not job.path.exists()


def test_a_form_that_overflows_is_refused(llama: Model, heldout: Text) -> None:
    def layer(_model: Model, _index: int, source: FloatLayer) -> FloatLayer:
        return replace(source, weights={role: weight * 1e30 for role, weight in source.weights.items()})

    with pytest.raises(UserError, match="the engine's logits hold nan, first at sequence 0"):
        measure(llama, heldout, [Form("it", "too large", layer)])


def test_the_table_has_models_side_by_side(
    make_llama: Callable[..., Path], text: Text, heldout: Text, job: Job
) -> None:
    other = replace(job, model=open_llama(make_llama(seed=1)), rows=(RECIPE,))
    found = [run(each, "a command") for each in (replace(job, rows=(RECIPE, *PIECE)), other)]
    contents = {
        name: {"command": f"the command of {name}", "details": each.as_details()}
        for name, each in zip(real_table.MODELS, found, strict=True)
    }
    lines = real_table.table(contents).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[2].startswith("| per token, the recipe's alpha | 0.0% | ")
    assert lines[3].endswith("|  |  |  |  |  |")  # not measured on the second
    assert all("dequantized from GGUF, not the published weights" in line for line in lines[-2:])
    interval = found[0].kl_difference(found[0].forms[PIECE[1]], found[0].forms[RECIPE])
    assert f"{interval.estimate:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})" in lines[4]


def test_results_are_read_strictly(job: Job) -> None:
    found = run(replace(job, rows=PIECE), "a piece")
    real_weights.store(job.path, "a piece", [], found.as_details() | {"more": 1})
    with pytest.raises(UserError, match="unknown key 'more'"):
        run(replace(job, rows=PIECE), "a piece")


def test_folders_are_not_made_without_the_tool_or_over_others(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tool:
        python: Path | None = None

    monkeypatch.setattr(llm_compressor_folders, "LLM_COMPRESSOR", Tool)
    with pytest.raises(UserError, match="environment of llm-compressor is not there"):
        llm_compressor_folders.make(llama_folder, str(text_file), tmp_path, 4, 32)
    Tool.python = tmp_path
    (tmp_path / "gptq").mkdir()
    with pytest.raises(UserError, match="gptq exists; expected a new folder"):
        llm_compressor_folders.make(llama_folder, str(text_file), tmp_path, 4, 32)


def test_results_hold_a_line_of_numbers_for_each_measure(job: Job) -> None:
    found: Results = run(replace(job, rows=PIECE), "a piece")
    lines = job.path.read_text().splitlines()
    numbers = [line for line in lines if '"kl": [' in line]
    assert len(numbers) == len(found.forms)
    assert all(line.rstrip(",").endswith("]") for line in numbers)
