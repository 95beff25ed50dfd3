"""The report's tables and headline, as HTML. Every text from outside is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from builders.validate.validation import Validation

ExtraRows = Mapping[str, Sequence[str]]  # title of a row -> one text per engine


def primary(validations: Sequence[Validation]) -> Validation:
    """The engine that the headline is about: the first with thresholds, else the first that is quantized."""
    return next(
        (found for found in validations if found.checks),
        next((found for found in validations if found.linears), validations[0]),
    )


def headline(validations: Sequence[Validation]) -> str:
    """Verdict, and four numbers of the primary engine."""
    checked = [found for found in validations if found.checks]
    missed = [found for found in checked if not found.passed]
    if not checked:
        verdict, css = "Measured; no thresholds were set", ""
    elif missed:
        verdict, css = f"Missed: {', '.join(found.label for found in missed)}", "miss"
    else:
        count = sum(len(found.checks) for found in checked)
        verdict, css = f"Passed: all {count} thresholds hold", "pass"
    main = primary(validations)
    metrics, subject = main.metrics, main.subject
    tiles = (
        (f"{100 * (metrics.perplexity_ratio - 1):+.2f} %", f"perplexity: {metrics.perplexity:.4g} against "
         f"{metrics.reference_perplexity:.4g}"),
        (f"{100 * metrics.top1:.1f} %", "top-1 agreement"),
        (f"{metrics.kl_mean:.3g}", f"mean KL, nats per token (99 %: {metrics.kl_p99:.3g})"),
        (size(subject["bytes"]), "on disk"),
    )  # fmt: skip
    boxes = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in tiles)
    return (
        f'<div class="verdict {css}">{escape(verdict)}</div>'
        f"<h1>{escape(main.label)} · {escape(subject['checkpoint'])}</h1>"
        f'<p class="soft">Against {escape(subject["reference"])}; {subject["sequences"]} sequences, '
        f"{subject['tokens']:,} tokens of {escape(subject['text'])}</p>"
        f'<div class="tiles">{boxes}</div>'
    )


def metrics_table(validations: Sequence[Validation], colours: Mapping[str, str], extra_rows: ExtraRows) -> str:
    """One row per measure, one column per engine; a measure with a threshold is marked."""
    perplexity = validations[0].metrics.reference_perplexity
    rows: list[tuple[str, str, str, Callable[[Validation], str]]] = [
        ("Perplexity", "", f"{perplexity:.4g}", lambda v: f"{v.metrics.perplexity:.4g}"),
        ("Perplexity / reference's", "perplexity_ratio", "1", lambda v: f"{v.metrics.perplexity_ratio:.5g}"),
        ("Mean KL, nats per token", "kl_mean", "0", lambda v: f"{v.metrics.kl_mean:.3g}"),
        ("99th-percentile KL", "kl_p99", "0", lambda v: f"{v.metrics.kl_p99:.3g}"),
        ("Top-1 agreement", "top1", "100 %", lambda v: f"{100 * v.metrics.top1:.2f} %"),
        ("Relative error of logits", "relative_error", "0", lambda v: f"{v.metrics.relative_error:.3g}"),
        ("Largest |Δ logit|", "", "0", lambda v: f"{v.metrics.max_abs_difference:.3g}"),
        ("Cosine of logits", "", "1", lambda v: f"{v.metrics.cosine:.6f}"),
        ("Size on disk", "", "", lambda v: size(v.subject["bytes"])),
    ]
    if any(found.exactness for found in validations):
        rows += [
            ("Distance to exact W8A8 (float64)", "", "", lambda v: f"{v.exactness.engine:.3g}" if v.exactness else ""),
            ("… PyTorch float32's own", "", "", lambda v: f"{v.exactness.pytorch:.3g}" if v.exactness else ""),
            (
                "… ratio",
                "exactness_ratio",
                "",
                lambda v: f"{v.exactness.ratio:.3g}" if v.exactness and v.exactness.pytorch else "",
            ),
        ]
    head = "".join(
        f'<th><span class="key {colours[found.label]}"></span>{escape(found.label)}</th>' for found in validations
    )
    body = []
    for title, measure, reference, show in rows:
        cells = "".join(f'<td class="{_mark(found, measure)}">{escape(show(found))}</td>' for found in validations)
        body.append(f"<tr><th>{escape(title)}</th><td>{escape(reference)}</td>{cells}</tr>")
    for title, texts in extra_rows.items():
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        body.append(f"<tr><th>{escape(title)}</th><td></td>{cells}</tr>")
    head = f"<tr><th></th><th>Reference ({escape(validations[0].subject['stored'])})</th>{head}</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def thresholds_table(validations: Sequence[Validation]) -> str:
    """One row per threshold; empty without thresholds."""
    rows = []
    for found in validations:
        for check in found.checks:
            smallest = "" if check.smallest_passing is None else f"{check.smallest_passing:g}"
            css, verdict = ("pass", "passed") if check.passed else ("miss", "missed")
            rows.append(
                f"<tr><th>{escape(found.label)}</th><th><code>{escape(check.name)}</code></th><td>{check.value:.4g}</td>"
                f'<td>{check.limit:g}</td><td class="{css}">{verdict}</td><td>{smallest}</td></tr>'
            )
    if not rows:
        return ""
    titles = ("Engine", "Threshold", "Measured", "Limit", "Verdict", "Tightest that passes")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        "<h2>Thresholds</h2>"
        f'<div class="scroll"><table class="checks"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def provenance(validations: Sequence[Validation]) -> str:
    """What was run: what all engines share, then the settings of each."""
    subject = validations[0].subject
    shared = {
        "Checkpoint": f"{subject['checkpoint']} (fingerprint {subject['model']})",
        "Reference": subject["reference"],
        "Text": f"{subject['text']} (fingerprint {subject['text_fingerprint']})",
        "Tokens": f"{subject['tokens']:,} in {subject['sequences']} sequences; "
        f"{validations[0].metrics.predicted:,} with a successor to predict",
        "Versions": ", ".join(f"{name} {version}" for name, version in subject["versions"].items()),
    }
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in shared.items())
    engines = "".join(
        f"<tr><th>{escape(found.label)}</th><td>{escape(_settings(found.subject))}</td></tr>" for found in validations
    )
    return f'<div class="scroll"><table class="left"><tbody>{rows}{engines}</tbody></table></div>'


def size(nbytes: int) -> str:
    """Bytes for people: 7.9 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _mark(found: Validation, measure: str) -> str:
    for check in found.checks:
        if check.name == measure:
            return "pass" if check.passed else "miss"
    return ""


def _settings(subject: Mapping) -> str:
    known = {key: value for key, value in subject["inputs"].items() if key != "model"}
    parts = [subject["engine"]]
    for key, value in known.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {setting}" for name, setting in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        parts.append(f"{key.replace('_', ' ')}: {value}")
    return "; ".join(parts)
