"""The report: one HTML file that needs nothing beside it, and reads in half a minute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from builders.report import plots
from builders.validate.validation import Validation

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d0d7de; --card: #f6f8fa; --paper: #fff;
  --good: #1a7f37; --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #8d96a0; --line: #30363d; --card: #161b22;
  --paper: #0d1117; --good: #3fb950; --bad: #f85149 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p { margin: .4rem 0 } .soft { color: var(--soft) } .good { color: var(--good) } .bad { color: var(--bad) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } thead th { border-bottom-width: 2px }
figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: .8rem 0; padding: .6rem }
figure svg { width: 100%; height: auto; display: block } figcaption { color: var(--soft); font-size: .85rem }
td.left { text-align: left; overflow-wrap: anywhere }
"""


class Row(NamedTuple):
    """A line of the table of metrics. hint: what the number says; show: how it is written."""

    name: str
    hint: str
    show: Callable[[Validation], str]


ROWS = (
    Row("perplexity", "lower is better", lambda v: f"{v.metrics.perplexity:.3f}"),
    Row("perplexity over the reference's", "1 is equal", lambda v: f"{v.metrics.perplexity_ratio:.4f}"),
    Row("KL to the reference, mean", "nats per token, 0 is equal", lambda v: f"{v.metrics.kl_mean:.5f}"),
    Row("KL to the reference, 99th percentile", "", lambda v: f"{v.metrics.kl_p99:.5f}"),
    Row("top-1 agreement", "same likeliest token", lambda v: f"{100 * v.metrics.top1:.2f} %"),
    Row("relative error of the logits", "", lambda v: f"{v.metrics.relative_error:.2e}"),
    Row("largest |difference| of a logit", "", lambda v: f"{v.metrics.max_abs_difference:.3g}"),
    Row("cosine of the logits", "1 is equal", lambda v: f"{v.metrics.cosine:.6f}"),
    Row("distance to exact W8A8", "engine / PyTorch float32", lambda v: _exactness(v)),
    Row("size", "of the engine folder", lambda v: f"{v.subject['bytes'] / 1e6:,.1f} MB"),
)

CAPTIONS = {
    "channels": "A few channels dwarf all others, in the same place for every token. One scale for them all leaves the "
    "others a handful of the 256 levels. Smoothing moves their range into the weights, where it does no harm.",
    "ranges": "After smoothing the largest channel (line) is near the median one (dots): 8 bits suffice.",
    "sqnr": "Each linear for itself, fed float input. A bad layer stands out in red.",
    "hidden": "What all layers up to this one have made of the text.",
    "kl": "The further left, the closer to the reference.",
    "scatter": "Every point is one logit of one token; the diagonal is equality.",
}


def page(validations: Sequence[Validation]) -> str:
    """The whole page. The last engine that has thresholds (or else the last) is the one that the plots show."""
    shown = next((v for v in reversed(validations) if v.checks), validations[-1])
    subject = shown.subject
    passed = all(validation.passed for validation in validations)
    checked = any(validation.checks for validation in validations)
    verdict = "measured, no thresholds set" if not checked else "validated" if passed else "thresholds missed"
    tone = "soft" if not checked else "good" if passed else "bad"
    title = f"{subject['checkpoint']}: {verdict}"
    pictures = [
        _figure(plots.channels(shown), "channels"),
        _figure(plots.ranges(shown), "ranges"),
        _figure(plots.sqnr(shown), "sqnr") if shown.linears else "",
        _figure(plots.hidden_errors(validations), "hidden") if any(v.hidden_errors for v in validations) else "",
    ]
    return "\n".join(
        (
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
            f'<h1>{escape(str(subject["checkpoint"]))}: <span class="{tone}">{verdict}</span></h1>',
            f'<p class="soft">{subject["tokens"]:,} tokens of held-out text ({escape(str(subject["text"]))}), against '
            f"{escape(str(subject['reference']))}.</p>",
            "<h2>Engines against the reference</h2>",
            _metrics(validations),
            _thresholds(validations),
            "<h2>Activations</h2>",
            *pictures[:2],
            "<h2>Where the error comes from</h2>" if any(pictures[2:]) else "",
            *pictures[2:],
            "<h2>Logits</h2>",
            _figure(plots.kl(validations), "kl"),
            _figure(plots.scatter(validations), "scatter"),
            "<h2>What was run</h2>",
            _subject(validations),
            "</body></html>",
        )
    )


def _metrics(validations: Sequence[Validation]) -> str:
    head = "".join(f"<th>{escape(validation.label)}</th>" for validation in validations)
    reference = validations[0].metrics.reference_perplexity
    lines = []
    for row in ROWS:
        cells = [row.show(validation) for validation in validations]
        if any(cells):
            hint = f'<br><span class="soft">{escape(row.hint)}</span>' if row.hint else ""
            body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            lines.append(f"<tr><td>{escape(row.name)}{hint}</td>{body}</tr>")
    return (
        f"<table><thead><tr><th>reference perplexity {reference:.3f}</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _thresholds(validations: Sequence[Validation]) -> str:
    lines = [
        f'<p class="{"good" if check.passed else "bad"}">{"✓" if check.passed else "✗"} '
        f"{escape(validation.label)}: {escape(check.sentence)}</p>"
        for validation in validations
        for check in validation.checks
    ]
    return "<h2>Thresholds</h2>" + "".join(lines) if lines else ""


def _subject(validations: Sequence[Validation]) -> str:
    lines = []
    for validation in validations:
        for name, value in validation.subject.items():
            text = ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)
            lines.append((validation.label, name, text))
    shared = {(name, text) for _, name, text in lines if all((v.label, name, text) in lines for v in validations)}
    rows = [("all", name, text) for name, text in dict.fromkeys((n, t) for _, n, t in lines) if (name, text) in shared]
    rows += [line for line in lines if line[1:] not in shared]
    body = "".join(
        f'<tr><td>{escape(label)}</td><td class="left">{escape(name)}</td><td class="left">{escape(text)}</td></tr>'
        for label, name, text in rows
    )
    return f"<table><tbody>{body}</tbody></table>"


def _exactness(validation: Validation) -> str:
    found = validation.exactness
    return f"{found.engine:.2e} / {found.pytorch:.2e} = {found.ratio:.2f}" if found else ""


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(CAPTIONS[caption])}</figcaption></figure>"
