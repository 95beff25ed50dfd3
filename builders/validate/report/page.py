"""Make the report of a validation, `report.html.jinja`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from builders.validate.layers import TOKENS
from builders.validate.report import plots, tables
from builders.validate.report.svg import series
from builders.validate.report.template import filled
from builders.validate.validation import Validation

MARK = "smoothquant validation report"  # by which we know a report of ours


def page(validations: Sequence[Validation], extra_rows: tables.ExtraRows) -> str:
    """The text of the whole page."""
    colours = series(found.label for found in validations)
    quantized = [found for found in validations if found.linears]
    verdict, css = tables.verdict(validations)
    main = tables.primary(validations)
    return filled(
        "report.html.jinja",
        MARK,
        validations=validations,
        quantized=quantized,
        main=main,
        colours=colours,
        quantized_colours={found.label: colours[found.label] for found in quantized},
        verdict=verdict,
        css=css,
        tiles=tables.tiles(main),
        measures=tables.measures(validations, extra_rows),
        activations=[
            (labels, plots.channels(shown.channels), plots.activation_ranges(shown))
            for shown, labels in _alike(_smoothed(validations), lambda found: found.ranges)
        ],
        bounds=plots.bounds(),
        maps=[
            (labels, shown.worst, plots.sqnr_map(shown))
            for shown, labels in _alike(quantized, lambda found: found.linears)
        ],
        diagnosed=TOKENS,
        hidden_errors=[plots.hidden_errors(quantized, colours)] if quantized else [],
        logits=[
            plots.kl_histogram(validations, colours),
            *(plots.scatter(found, colours[found.label]) for found in validations),
        ],
        provenance=tables.provenance(validations),
    )


def _smoothed(validations: Sequence[Validation]) -> Sequence[Validation]:
    """The engines whose activations smoothing has changed; the first engine if there are none."""
    changed = [v for v in validations if any(found.before_max != found.after_max for found in v.ranges)]
    return changed or validations[:1]


def _alike(
    validations: Sequence[Validation], trait: Callable[[Validation], Hashable]
) -> Iterator[tuple[Validation, str]]:
    """Yield one validation of each group with an equal trait, with the labels of the whole group."""
    groups: dict[Hashable, list[Validation]] = {}
    for found in validations:
        groups.setdefault(trait(found), []).append(found)
    for group in groups.values():
        yield group[0], ", ".join(found.label for found in group)
