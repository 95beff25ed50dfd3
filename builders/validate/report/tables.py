"""The texts of the report's headline and tables. They are plain: the template escapes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from builders.validate.validation import Validation

ExtraRows = Mapping[str, Sequence[str]]  # title of a row -> one text for each engine
Row = tuple[
    str, str, list[tuple[str, str]]
]  # title, the reference's value, and for each engine its value and "pass", "miss" or ""


def primary(validations: Sequence[Validation]) -> Validation:
    """The engine of the headline: the first with thresholds, or else the first that is quantized."""
    return next(
        (found for found in validations if found.checks),
        next((found for found in validations if found.linears), validations[0]),
    )


def verdict(validations: Sequence[Validation]) -> tuple[str, str]:
    """The verdict on all thresholds: a sentence, and "pass", "miss", or "" without thresholds."""
    checked = [found for found in validations if found.checks]
    missed = [
        found.label + (found.advice and f" (try {found.advice})") for found in validations if found.passed is False
    ]
    if missed:
        return f"Missed: {', '.join(missed)}", "miss"
    if not checked:
        return "Measured; no thresholds were set", ""
    return f"Passed: all {sum(len(found.checks) for found in checked)} thresholds hold", "pass"


def tiles(found: Validation) -> list[tuple[str, str]]:
    """The four numbers of the headline, each with its label."""
    metrics = found.metrics
    perplexities = f"{metrics.perplexity:.4g} against {metrics.reference_perplexity:.4g}"
    return [
        (f"{100 * (metrics.perplexity_ratio - 1):+.2f} %", f"perplexity: {perplexities}"),
        (f"{100 * metrics.top1:.1f} %", f"top-1 agreement ({percent(metrics.top1_clear)} without ambiguous tokens)"),
        (f"{metrics.kl_mean:.3g}", f"mean KL, nats per token (99 %: {metrics.kl_p99:.3g})"),
        (size(found.subject["bytes"]), "on disk"),
    ]


def measures(validations: Sequence[Validation], extra_rows: ExtraRows) -> list[Row]:
    """The rows of the table: one for each measure, then `extra_rows`."""

    def row(title: str, reference: str, show: Callable[[Validation], str], threshold: str = "") -> Row:
        return title, reference, [(show(found), _mark(found, threshold)) for found in validations]

    perplexity = f"{validations[0].metrics.reference_perplexity:.4g}"
    rows = [
        row("Perplexity", perplexity, lambda v: f"{v.metrics.perplexity:.4g}"),
        row("Perplexity / reference's", "1", lambda v: f"{v.metrics.perplexity_ratio:.5g}", "perplexity_ratio"),
        row("Mean KL, nats per token", "0", lambda v: f"{v.metrics.kl_mean:.3g}", "kl_mean"),
        row("99th-percentile KL", "0", lambda v: f"{v.metrics.kl_p99:.3g}", "kl_p99"),
        row("Top-1 agreement", "100 %", lambda v: percent(v.metrics.top1), "top1"),
        row("… without ambiguous tokens", "100 %", lambda v: percent(v.metrics.top1_clear)),
        row("… ambiguous tokens", "", lambda v: percent(v.metrics.ambiguous)),
        row("99th-percentile logit error", "0", lambda v: f"{v.metrics.logit_error_p99:.3g}"),
        row("Relative error of logits", "0", lambda v: f"{v.metrics.relative_error:.3g}", "relative_error"),
        row("Largest |Δ logit|", "0", lambda v: f"{v.metrics.max_abs_difference:.3g}"),
        row("Cosine of logits", "1", lambda v: f"{v.metrics.cosine:.6f}"),
        row("Size on disk", "", lambda v: size(v.subject["bytes"])),
    ]
    if any(found.exactness for found in validations):
        rows += [
            row("Distance to exact W8A8 (float64)", "", lambda v: f"{v.exactness.engine:.3g}" if v.exactness else ""),
            row("… PyTorch float32's own", "", lambda v: f"{v.exactness.pytorch:.3g}" if v.exactness else ""),
            row("… ratio", "", _ratio, "exactness_ratio"),
        ]
    return rows + [(title, "", [(text, "") for text in texts]) for title, texts in extra_rows.items()]


def provenance(validations: Sequence[Validation]) -> list[tuple[str, str]]:
    """The rows about the run: first the facts that all engines share, then the settings of each."""
    subject, metrics = validations[0].subject, validations[0].metrics
    start = subject.get("sequence_start")  # older reports do not have it
    count = f"{subject['tokens']:,} in {subject['sequences']} sequences{f' that begin with {start}' if start else ''}"
    return [
        ("Checkpoint", f"{subject['checkpoint']} (fingerprint {subject['model']})"),
        ("Reference", subject["reference"]),
        ("Text", f"{subject['text']} (fingerprint {subject['text_fingerprint']})"),
        ("Tokens", f"{count}; {metrics.predicted:,} with a successor to predict"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in subject["versions"].items())),
        *((found.label, _settings(found.subject)) for found in validations),
    ]


def percent(share: float | None) -> str:
    """A share for people, such as 98.42 %; empty for none."""
    return "" if share is None else f"{100 * share:.2f} %"


def size(nbytes: int) -> str:
    """A number of bytes for people, such as 7.9 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _ratio(found: Validation) -> str:
    return f"{found.exactness.ratio:.3g}" if found.exactness and found.exactness.pytorch else ""


def _mark(found: Validation, threshold: str) -> str:
    return next((("pass" if check.passed else "miss") for check in found.checks if check.name == threshold), "")


def _settings(subject: Mapping) -> str:
    """The engine and its settings in one line."""
    parts = [subject["engine"]]
    known = {key: value for key, value in subject["inputs"].items() if key != "model"}
    for key, value in known.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {setting}" for name, setting in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        parts.append(f"{key.replace('_', ' ')}: {value}")
    return "; ".join(parts)
