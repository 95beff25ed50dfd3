"""The table of `real_weights`: the forms of several models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from smoothquant.artifacts.record import read
from tests.benchmarks.real_measures import Measured, Results

MODELS = {  # result: the model, and what its weights were dequantized from
    "real_weights_smollm2": ("SmolLM2-135M-Instruct", "Q4_1"),
    "real_weights_qwen": ("Qwen2.5-Coder-0.5B-Instruct", "Q4_K_M"),
}
COLUMNS = "KL | KL less the recipe's (95 %) | perplexity | top-1"
ORIGIN = "dequantized from GGUF, not the published weights"


def table(found: Mapping[str, Mapping]) -> str:
    """A line for each form. found: for each of MODELS the content of its file."""
    results = {name: read(Results, found[name]["details"], name) for name in MODELS}
    labels = {name: form.label for each in results.values() for name, form in each.forms.items()}
    heads = [f"{model}: in float | {COLUMNS}" for model, _ in MODELS.values()]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|---|---|---|---|' * len(heads)}"]
    for name, label in labels.items():
        cells = [cell for each in results.values() for cell in _cells(each, each.forms.get(name))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    notes = [_note(*MODELS[name], each, found[name]["command"]) for name, each in results.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def _cells(results: Results, form: Measured | None) -> Iterator[str]:
    if form is None:
        yield from [""] * 5
        return
    yield "" if form.share is None else f"{form.share:.1%}"
    yield f"{results.kl(form):.4f}"
    recipe = results.forms.get(results.against)
    if recipe is None or recipe == form:
        yield ""
    else:
        estimate, low, high = results.kl_difference(form, recipe)
        yield f"{estimate:+.4f} ({low:+.4f} to {high:+.4f})"
    yield f"{results.perplexity_ratio(form).estimate - 1:+.2%}"
    yield f"{results.top1(form):.1%}"


def _note(model: str, origin: str, results: Results, command: str) -> str:
    return (
        f"* {model} ({ORIGIN}: {origin}): {len(results.lengths)} sequences, {results.tokens:,} tokens, float "
        f"perplexity {results.perplexity:.2f}, the recipe's alpha {results.alpha}; `{command}`"
    )
