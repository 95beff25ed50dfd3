"""The texts of a plan's page. They are plain: the template escapes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from builders.validate.report.plan_view import PlannedInput, PlanView, candidate_words
from builders.validate.report.svg import element
from builders.validate.report.tables import percent, size
from smoothquant.artifacts.plan import NEAREST, NONE, WHOLE, PlanOutcome

NEXT = 5  # inputs that the next bytes would leave in float
LARGEST = 10  # inputs with the largest spikes
MOST = 3  # linears that are named behind the first of an input
BAR = 160  # px: the longest bar
TOO_MUCH = " That is more than it may cost: it stays in float."

Outcome = tuple[
    str, str, list[str], bool
]  # name, the bar of its KL, texts as the header has them; whether it was chosen


def tiles(view: PlanView) -> list[tuple[str, str]]:
    """The numbers of the headline, each with its label."""
    taken = view.taken
    return [
        (f"{taken.kl:.3g}", "mean KL to the float model, nats per token"),
        (f"{100 * (taken.perplexity_ratio - 1):+.2f} %", "perplexity to the float model's"),
        (percent(taken.top1), "top-1 agreement"),
        (percent(view.float_share), f"of {size(view.all_bytes)} in INT8 stay in float"),
    ]


def outcomes(found: Sequence[PlanOutcome], chosen: PlanOutcome) -> list[Outcome]:
    """Rows of models that were run end to end."""
    most = max(one.kl for one in found) or 1.0
    return [
        (
            one.name,
            _bar(one.kl / most, "after" if one is chosen else "s7"),
            [f"{one.kl:.4g}", f"{100 * (one.perplexity_ratio - 1):+.2f} %", percent(one.top1)],
            one is chosen,
        )
        for one in found
    ]


def points(view: PlanView) -> list[Outcome]:
    """Rows of the curve, named by their bytes in float."""
    rows = outcomes(view.facts.curve, view.taken)
    sizes = [size(round(view.all_bytes * (1 + one.share))) for one in view.facts.curve]
    return [
        (percent(one.share), bar, [*texts, nbytes], chosen)
        for one, nbytes, (_, bar, texts, chosen) in zip(view.facts.curve, sizes, rows, strict=True)
    ]


def choices(view: PlanView) -> list[tuple[str, str, str]]:
    """For each kind of group its name, where it is folded, and how many took which candidate."""
    rows = []
    for kind, groups in view.groups.items():
        taken = Counter(one.chosen for one in groups)
        told = [f"{candidate_words(name)}: {count}" for name, count in taken.most_common()]
        rows.append((kind, ", ".join(dict.fromkeys(one.through for one in groups)), ", ".join(told)))
    return rows


def roundings(view: PlanView, names: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """For each kind of linear its name, how many there are, and for each rounding its mean error and how many took
    it."""
    rows = []
    for kind, placed in view.linears.items():
        mine = [one for _, one in placed]
        taken = Counter(one.rounding for one in mine)
        cells = []
        for name in names:
            errors = [one.errors[name] for one in mine if name in one.errors]
            cells.append(f"{fmean(errors):.3g}, taken by {taken[name]}" if errors else "")
        rows.append((kind, str(len(mine)), cells))
    return rows


def head(view: PlanView) -> str:
    """What was chosen for the output head, and what it costs; empty where none in INT8 was looked for."""
    found = view.facts.head
    if found is None:
        return ""
    scale = "not smoothed" if found.scale == NONE else f"smoothed ({candidate_words(found.scale)}), by the final norm"
    told = (
        f"Output head in INT8: its input is {scale}, its weight rounded: {found.rounding}. It costs a KL of "
        f"{found.tried[found.scale][found.rounding]:.3g} to a float head that reads the same input"
    )
    plain = found.tried.get(NONE, {}).get(NEAREST)
    told += "" if plain is None else f"; not smoothed and rounded to nearest, {plain:.3g}"
    told += (
        f". The whole model, all linears in INT8: {found.in_int8.kl:.4g} with this head, {found.in_float.kl:.4g} with "
        "a float one."
    )
    return told if view.facts.scheme.head.quantized else told + TOO_MUCH


def embedding(view: PlanView) -> str:
    """What the embedding in INT8 costs; empty where none was looked for."""
    found, scheme = view.facts.embedding, view.facts.scheme
    if found is None:
        return ""
    shared = scheme.head.quantized and view.model.geometry.tied_embeddings
    told = (
        f"Embedding in INT8{', in one table with the output head' if shared else ''}: the whole model, with "
        f"{found.in_int8.share:.1%} in float, has a KL of {found.in_int8.kl:.4g} with it, {found.in_float.kl:.4g} with "
        "a float one."
    )
    return told if scheme.embedding.quantized else told + TOO_MUCH


def cache(view: PlanView) -> str:
    """From where on values of an INT8 KV cache saturate; empty where that was not chosen."""
    found = view.facts.caches
    if not found:
        return ""
    shares = sorted(one.chosen for one in found)
    errors = [one.tried[f"{one.chosen:g}"] / one.tried[WHOLE] for one in found if one.tried[WHOLE]] or [1.0]
    return (
        f"INT8 KV cache: values saturate from {shares[0]:.0%} to {shares[-1]:.0%} of their maximum on, layer by layer. "
        f"That leaves {fmean(errors):.0%} of the squared error that they would have if none did."
    )


def in_float(view: PlanView) -> list[tuple[str, list[str]]]:
    """Rows of the linears in float, by what each MB wins, then of those that would be next."""
    kept = [one for one in view.by_loss if one.in_float]
    after = [one for one in view.by_loss if not one.in_float][:NEXT]
    return [(_named(one), [*_lost(one), "in float"]) for one in kept] + [
        (_named(one), [*_lost(one), ""]) for one in after
    ]


def spikes(view: PlanView) -> list[tuple[str, list[str]]]:
    """Rows of the inputs with the largest spike ratios."""
    return [
        (
            _named(one),
            [f"{one.largest:.4g}", f"{one.median:.3g}", _ratio(one.spike), "in float" if one.in_float else ""],
        )
        for one in view.by_spike[:LARGEST]
        if one.spike
    ]


def provenance(view: PlanView) -> list[tuple[str, str]]:
    """The rows about the search."""
    facts = view.facts
    scheme = {name: told for name, told in facts.scheme.words().items() if isinstance(told, str)}
    checkpoint = view.model.checkpoint.folder.resolve().name
    rows = [
        ("Plan", f"{view.plan.folder} (fingerprint {view.plan.fingerprint})"),
        (
            "Checkpoint",
            f"{checkpoint} (fingerprint {facts.model}), family {facts.family}",
        ),
        ("Text", f"fingerprint {facts.text}"),
        ("Tokens", f"made from {facts.tokens:,}, trials from {facts.trial:,}; {facts.apart:,} others only judge"),
        ("Second moments", f"in blocks of up to {facts.width:,} channels"),
        ("Target", ", ".join(f"{name.replace('_', ' ')} {told}" for name, told in scheme.items())),
        ("Groups", f"{facts.smoothing.groups}; the recipe's alpha {facts.smoothing.alpha:g}"),
    ]
    if facts.max_positions is not None:
        rows.append(("Rotary frequencies", f"for up to {facts.max_positions:,} positions"))
    return rows


def _named(one: PlannedInput) -> str:
    first, *others = one.names
    if len(others) > MOST:
        return f"{first} and {len(others)} more"
    return ", ".join([first, *(name.rpartition(".")[2] for name in others)])


def _lost(one: PlannedInput) -> list[str]:
    return [size(one.numbers), f"{one.loss:.3g}", f"{one.loss_by_mb:.3g}", _ratio(one.spike)]


def _ratio(spike: float) -> str:
    return f"{spike:,.{0 if spike >= 100 else 1}f}" if spike else ""


def _bar(share: float, css: str) -> str:
    bar = f'<rect class="patch {css}" width="{max(share * BAR, 1):.1f}" height="12" rx="3"/>'
    return element(BAR, 12, bar, "KL, as a bar")
