"""The metrics against their formulas on whole logits, and their properties."""

from __future__ import annotations

import hypothesis
import numpy
import pytest
import torch
from hypothesis import strategies

from builders.validate import metrics
from builders.validate.metrics import Comparison, Metrics, check_logits, percentile
from smoothquant.errors import ThresholdError, UserError

VOCABULARY = 50
ERROR = {"logit_error_p99": 0.0}  # in the place of the one that is rounded


def logits(
    sequences: int = 3, tokens: int = 20, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(sequences):
        r = 3 * torch.randn(tokens + n, VOCABULARY, generator=generator)
        e = r + 0.5 * torch.randn(r.shape, generator=generator)
        e[4, r[4].argmax()] -= 9  # one mistake that is beyond doubt
        made.append((r, e, torch.randint(VOCABULARY, (tokens + n,), generator=generator)))
    return made


def compared(triples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Comparison:
    comparison = Comparison(sum(len(ids) for _, _, ids in triples))
    for reference, engine, ids in triples:
        comparison.add(reference, engine, ids)
    return comparison


def by_formula(triples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Metrics:
    """The definitions, in numpy, on all logits at once."""
    r, e = (numpy.concatenate([triple[side].double().numpy() for triple in triples]) for side in (0, 1))

    def softmax(x: numpy.ndarray) -> numpy.ndarray:
        exp = numpy.exp(x - x.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    p, q = softmax(r), softmax(e)
    kl = (p * numpy.log(p / q)).sum(axis=1)
    successors, rows, start = [], [], 0
    for _, _, ids in triples:
        rows += range(start, start + len(ids) - 1)
        successors += ids[1:].tolist()
        start += len(ids)
    losses = [-numpy.log(x[rows, successors]).mean() for x in (p, q)]
    agreeing = r.argmax(axis=1) == e.argmax(axis=1)
    ordered = numpy.sort(r, axis=1)
    gaps = ordered[:, -1] - ordered[:, -2]
    errors = numpy.sort(numpy.abs(e - r - (e - r).mean(axis=1, keepdims=True)), axis=None)
    error = errors[int(numpy.ceil(0.99 * len(errors))) - 1]
    return Metrics(
        tokens=len(r),
        predicted=len(rows),
        relative_error=numpy.linalg.norm(e - r) / numpy.linalg.norm(r),
        max_abs_difference=numpy.abs(e - r).max(),
        cosine=(e * r).sum() / numpy.linalg.norm(e) / numpy.linalg.norm(r),
        kl_mean=kl.mean(),
        kl_p99=numpy.percentile(kl, 99),
        top1=agreeing.mean(),
        top1_clear=agreeing[gaps >= error].mean(),
        ambiguous=(gaps < error).mean(),
        logit_error_p99=error,
        reference_perplexity=numpy.exp(losses[0]),
        perplexity=numpy.exp(losses[1]),
        perplexity_ratio=numpy.exp(losses[1]) / numpy.exp(losses[0]),
    )


@pytest.mark.parametrize("elements", [metrics.ELEMENTS, 7 * VOCABULARY, 1])
def test_all_are_what_their_formulas_say(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are widened at a time. Float64 on both sides: 1e-10 is a thousandfold of its rounding."""
    monkeypatch.setattr(metrics, "ELEMENTS", elements)
    found, expected = compared(logits()).metrics(), by_formula(logits())
    assert found.logit_error_p99 == pytest.approx(expected.logit_error_p99, rel=2**-8)  # bfloat16 has 8 bits
    assert vars(found) | ERROR == pytest.approx(vars(expected) | ERROR, rel=1e-10)
    shares = (expected.top1, expected.top1_clear, expected.ambiguous)
    assert not {0, 1} & {*shares}  # or the comparison says little
    assert expected.top1_clear > expected.top1


def test_last_token_of_a_sequence_predicts_nothing() -> None:
    """Changing the logits of last tokens changes KL, and not perplexity."""
    triples = logits()
    changed = [(r, torch.cat((e[:-1], e[-1:].flip(-1))), ids) for r, e, ids in triples]
    before, after = compared(triples).metrics(), compared(changed).metrics()
    assert after.perplexity == before.perplexity
    assert after.kl_mean != before.kl_mean


@hypothesis.given(strategies.integers(0, 10_000), strategies.floats(0.0, 30.0))
@hypothesis.settings(max_examples=50, deadline=None)
def test_kl_is_never_negative_and_zero_only_for_equals(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    r, noise = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, (6,), generator=generator)
    found = compared([(r, r + size * noise, ids)]).metrics()
    same = compared([(r, r.clone(), ids)]).metrics()
    assert found.kl_mean >= 0
    assert found.kl_p99 >= 0
    assert (same.kl_mean, same.top1, same.perplexity_ratio, same.relative_error) == (0, 1, 1, 0)
    assert (same.top1_clear, same.ambiguous, same.logit_error_p99) == (1, 0, 0)


@hypothesis.given(
    strategies.integers(0, 10_000), strategies.lists(strategies.integers(-64, 64), min_size=6, max_size=6)
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_a_constant_per_token_changes_no_probability(seed: int, constants: list[int]) -> None:
    """Logits in eighths and whole constants: the sums are exact, so that top-1 must agree exactly."""
    generator = torch.Generator().manual_seed(seed)
    r, e = torch.randint(-80, 80, (2, 6, 11), generator=generator) / 8
    ids = torch.randint(11, (6,), generator=generator)
    found = compared([(r, e, ids)]).metrics()
    moved = compared([(r, e + torch.tensor(constants)[:, None], ids)]).metrics()
    for name in ("top1", "top1_clear", "ambiguous", "logit_error_p99"):
        assert getattr(moved, name) == getattr(found, name)
    for name in ("kl_mean", "kl_p99", "perplexity", "perplexity_ratio"):
        assert getattr(moved, name) == pytest.approx(getattr(found, name), rel=1e-9, abs=1e-12)  # float64, summed


@pytest.mark.parametrize("far", [1e3, 3.4e38])
def test_extreme_logits_stay_finite(far: float) -> None:
    """A probability of exp(-2000) is 0 in float64, a perplexity of exp(2000) infinite: neither may become NaN."""
    r = torch.zeros(4, 3)
    r[:, 0] = far
    e = torch.zeros(4, 3)
    e[:, 1] = far
    found = compared([(r, e, torch.zeros(4, dtype=torch.int64))]).metrics()
    assert found.kl_mean == torch.tensor(far).item()
    assert all(numpy.isfinite(value) for value in vars(found).values())


def test_a_near_tie_is_ambiguous_and_not_wrong() -> None:
    """The best two of 100 tokens are exchanged twice, by errors of their gap; both logits of a token are off alike."""
    r = torch.tensor([4.0, 0.0]).repeat(100, 1)
    r[7], r[23], r[24] = torch.tensor([4.0, 3.75]), torch.tensor([4.0, 3.5]), torch.tensor([4.0, 3.75])
    e = r.clone()
    e[7] = torch.tensor([3.75, 4.0])  # a gap of 0.25, an error of 0.25 on each
    e[23] = torch.tensor([3.5, 4.0])  # a gap of 0.5, an error of 0.5 on each
    found = compared([(r, e, torch.zeros(100, dtype=torch.int64))]).metrics()
    assert found.logit_error_p99 == 0.25  # 98 in 100 are 0, 1 is 0.25, 1 is 0.5
    assert (found.top1, found.ambiguous) == (0.98, 0)  # a gap of just the error is none
    e[50] += torch.tensor([0.3125, -0.3125])
    found = compared([(r, e, torch.zeros(100, dtype=torch.int64))]).metrics()
    assert found.logit_error_p99 == 0.3125
    assert found.ambiguous == 0.02  # 7, and 24, on which the engine agrees
    assert (found.top1, found.top1_clear) == (0.98, pytest.approx(97 / 98))


@hypothesis.given(strategies.integers(0, 10_000), strategies.floats(0.0, 3.0), strategies.integers(1, 5))
@hypothesis.settings(max_examples=50, deadline=None)
def test_a_mistake_on_a_clear_token_takes_an_error_beyond_the_usual(seed: int, size: float, cut: int) -> None:
    """Two logits are exchanged only by errors whose sum is their gap or more. And a sum of parts is the sum."""
    generator = torch.Generator().manual_seed(seed)
    r, noise = torch.randn(2, 6, 11, generator=generator)
    e, ids = r + size * noise, torch.zeros(6, dtype=torch.int64)
    comparison = compared([(r, e, ids)])
    found, error = comparison.metrics(), (e - r - (e - r).mean(dim=1, keepdim=True)).abs()
    wrong = r.argmax(dim=1) != e.argmax(dim=1)
    largest = error.topk(2, dim=1).values.sum(dim=1)
    if found.top1_clear is not None and found.top1_clear < 1:
        assert (largest[wrong] >= found.logit_error_p99 * (1 - 2**-8)).any()
    else:
        assert int(wrong.sum()) <= round(6 * found.ambiguous)
    first = compared([(r[:cut], e[:cut], ids[:cut])])
    resumed = Comparison(6)
    resumed.restore(first.state())
    resumed.add(r[cut:], e[cut:], ids[cut:])
    for name in ("top1", "top1_clear", "ambiguous", "logit_error_p99"):
        assert getattr(resumed.metrics(), name) == getattr(found, name)


def test_without_clear_tokens_there_is_no_agreement_on_them() -> None:
    r = torch.zeros(3, 4)
    found = compared([(r, r + torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))]).metrics()
    assert (found.ambiguous, found.top1_clear) == (1, None)


def test_histogram_counts_every_token_where_its_kl_lies() -> None:
    triples = logits()
    comparison = compared(triples)
    samples = comparison.samples()
    kl = [
        (r.double().softmax(-1) * (r.double().log_softmax(-1) - e.double().log_softmax(-1))).sum(-1)
        for r, e, _ in triples
    ]
    expected, _ = numpy.histogram(torch.cat(kl).numpy(), bins=samples.edges)
    assert list(samples.histogram) == expected.tolist()


def test_plotted_points_come_evenly_from_all_sequences() -> None:
    """Engine and reference differ by the number of the sequence: each point tells where it is from."""
    triples = [(r, r + n, ids) for n, (r, _, ids) in enumerate(logits(tokens=40))]
    points = compared(triples).samples().points
    from_sequence = [round(e - r) for r, e in points]
    assert all(abs(e - r - round(e - r)) < 0.02 for r, e in points)  # four digits of logits of some tens
    for n, (_, _, ids) in enumerate(triples):
        share = len(ids) / sum(len(ids) for _, _, ids in triples)
        assert from_sequence.count(n) == pytest.approx(share * metrics.POINTS, abs=1)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 100, 101])
def test_percentile_is_numpys(share: float, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    assert percentile(values, share) == pytest.approx(numpy.percentile(values.numpy(), 100 * share), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_told_by_position(bad: float) -> None:
    values = torch.zeros(1, 9, VOCABULARY)
    values[0, 4, 17] = values[0, 4, 20] = values[0, 6, 1] = bad
    with pytest.raises(ThresholdError, match="first at sequence 3, token 4, entry 17"):
        check_logits(values, 9, VOCABULARY, 3)


def test_logits_of_another_shape() -> None:
    with pytest.raises(UserError, match=r"vocabulary of 49.*expected 50"):
        check_logits(torch.zeros(1, 9, 49), 9, VOCABULARY, 0)
    with pytest.raises(UserError, match=r"\[1, 8, 50\]; expected \[1, 9, 50\]"):
        check_logits(torch.zeros(1, 8, VOCABULARY), 9, VOCABULARY, 0)
