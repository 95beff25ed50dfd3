"""The report: one self-contained HTML page. It loads nothing: style and plots are in it, and there are no scripts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from html import escape

from builders.validate.report import plots, tables
from builders.validate.report.style import STYLE
from builders.validate.validation import Validation

SERIES = 8  # colours of engines: s0 .. s7, then again


def page(validations: Sequence[Validation], extra_rows: tables.ExtraRows) -> str:
    """The whole document."""
    colours = {found.label: f"s{number % SERIES}" for number, found in enumerate(validations)}
    sections = (
        tables.headline(validations),
        "<h2>Measures</h2>",
        tables.metrics_table(validations, colours, extra_rows),
        tables.thresholds_table(validations),
        _activations(validations),
        _errors(validations, colours),
        _logits(validations, colours),
        "<h2>What was run</h2>",
        tables.provenance(validations),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(tables.primary(validations).label)}: validation</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _activations(validations: Sequence[Validation]) -> str:
    parts = [
        "<h2>Activations before and after smoothing</h2>",
        '<p class="soft">Largest |activation| of each channel on this text. INT8 spends its 127 steps on the largest: '
        "the taller the band from the median channel (dashed) to the largest, the fewer are left for all others.</p>",
        '<div class="legend"><span class="key before"></span>before<span class="key after"></span>after</div>',
    ]
    for shown, labels in _alike(_smoothed(validations), lambda found: found.ranges):
        if len(validations) > 1:
            parts.append(f"<h3>{escape(labels)}</h3>")
        parts += [_cards(plots.channels(shown), "two"), _cards(plots.activation_ranges(shown), "two")]
    return "".join(parts)


def _errors(validations: Sequence[Validation], colours: dict[str, str]) -> str:
    quantized = [found for found in validations if found.linears]
    if not quantized:
        return ""
    bounds = [f"&lt; {plots.BINS[0]}", *(f"{edge}+" for edge in plots.BINS)]
    keys = "".join(f'<span class="cellkey h{n}">{bound}</span>' for n, bound in enumerate(bounds))
    parts = [
        "<h2>Quantization error by layer</h2>",
        '<p class="soft">SQNR of every linear in dB: its W8A8 output against the float output for the same input. '
        "10 dB is an error of 32 %, 20 dB of 10 %, 30 dB of 3 %.</p>",
        f'<div class="legend">{keys}</div>',
    ]
    for found, labels in _alike(quantized, lambda found: found.linears):
        worst = min(found.linears, key=lambda linear: linear.sqnr)
        parts.append(
            f"<figure><figcaption><b>{escape(labels)}</b>; lowest: {escape(worst.name)}, {worst.sqnr:.1f} dB"
            f'</figcaption><div class="card">{plots.sqnr_map(found)}</div></figure>'
        )
    parts += [_legend(quantized, colours), _cards([plots.hidden_errors(quantized, colours)], "two")]
    return "".join(parts)


def _logits(validations: Sequence[Validation], colours: dict[str, str]) -> str:
    histogram = plots.kl_histogram(validations, colours)
    scatters = [plots.scatter(found, colours[found.label]) for found in validations]
    return (
        "<h2>Logits</h2>"
        f'<p class="soft">KL of every token to the reference, and {len(validations[0].samples.points):,} logits drawn '
        "evenly from the text: on the dashed line, engine and reference agree.</p>"
        f"{_legend(validations, colours)}{_cards([histogram, *scatters])}"
    )


def _smoothed(validations: Sequence[Validation]) -> Sequence[Validation]:
    """The engines whose activations smoothing has changed, or the first where there is none."""
    changed = [v for v in validations if any(found.before_max != found.after_max for found in v.ranges)]
    return changed or validations[:1]


def _alike(
    validations: Sequence[Validation], trait: Callable[[Validation], Hashable]
) -> Iterator[tuple[Validation, str]]:
    """One validation of each group with an equal trait, and the labels of the whole group."""
    groups: dict[Hashable, list[Validation]] = {}
    for found in validations:
        groups.setdefault(trait(found), []).append(found)
    for group in groups.values():
        yield group[0], ", ".join(found.label for found in group)


def _legend(validations: Sequence[Validation], colours: dict[str, str]) -> str:
    keys = (f'<span class="key {colours[found.label]}"></span>{escape(found.label)}' for found in validations)
    return f'<div class="legend">{"".join(keys)}</div>'


def _cards(images: Sequence[str], columns: str = "three") -> str:
    return f'<div class="grid {columns}">' + "".join(f'<div class="card">{image}</div>' for image in images) + "</div>"
