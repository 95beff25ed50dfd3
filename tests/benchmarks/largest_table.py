"""The table of `largest`: what one layer and two layers took, beside what `estimate` says of the whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.benchmarks.largest import CONFIGS, STEPS
from tests.benchmarks.results import FOLDER

ALWAYS = STEPS[:2]  # steps with a line even where they were not measured
HEADS = (
    "",
    "weights",
    "one layer",
    "two layers",
    "all layers: of processor",
    "all layers: by the clock",
    "`estimate`: time",
    "peak of one, two layers",
    "`estimate`: memory without `--memory`",
)
NONE = "not measured"


def table() -> str:
    """A line for each model and step; under it how they were measured, and what the extrapolation takes for granted."""
    found = {}
    for name in CONFIGS:
        path = FOLDER / f"largest_{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    for name in CONFIGS:
        details = found[name]["details"] if name in found else {"runs": {}, "estimate": {}}
        for step in STEPS:
            if step in ALWAYS or step in details["runs"]:
                lines.append(f"| {name}, {_depth(name)} layers: {step} | {' | '.join(_cells(name, details, step))} |")
    return "\n".join([*lines, "", *(_note(name, result) for name, result in found.items())]) + "\n"


def _depth(name: str) -> int:
    return CONFIGS[name].get("num_hidden_layers") or CONFIGS[name]["n_layer"]


def _cells(name: str, details: dict, step: str) -> Iterator[str]:
    runs, said = details["runs"].get(step, {}), details["estimate"]
    yield f"{said[ALWAYS[1]]['read'] / 1e9:.0f} GB" if ALWAYS[1] in said else ""
    for layers in ("1", "2"):
        run = runs.get(layers)
        yield f"{run['processor']:.0f} s, {run['seconds']:.0f} s by the clock" if run else NONE
    for kind in ("processor", "seconds"):
        yield _time(_extrapolated(runs["1"][kind], runs["2"][kind], _depth(name))) if "2" in runs else NONE
    yield _time(said[step]["seconds"]) if step in said else NONE
    yield ", ".join(f"{run['peak_mb'] / 1e3:.2f}" for run in runs.values()) + " GB" if runs else NONE
    yield f"{said[step]['memory'] / 1e9:.1f} GB" if step in said else NONE


def _extrapolated(one: float, two: float, layers: int) -> float:
    return one + (layers - 1) * max(0.0, two - one)


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"


def _note(name: str, result: dict) -> str:
    details, machine = result["details"], result["machine"]
    _, samples, _, length = details["amount"]
    runs = [run for runs in details["runs"].values() for run in runs.values()]
    loads = [details["load"], *(run["load"] for run in runs)]
    words = [f"{samples} x {length} tokens, threads: {details['threads']}"]
    if runs:
        words.append(f"`--memory {details['memory']}`, {details['dense']:.0%} of the layers' rows dense")
        words.append(f"act scales of all layers {details['estimate'][ALWAYS[0]]['written'] / 1e6:.0f} MB")
    whole = CONFIGS[name]["vocab_size"]
    if runs and details["vocabulary"] < whole:
        words.append(f"a vocabulary of {details['vocabulary']:,} instead of {whole:,}: less to copy for an export")
    if max(loads) > 1:
        span = " to ".join(dict.fromkeys(f"{load:.1f}" for load in (min(loads), max(loads))))
        words.append(f"**other work ran beside it**: a load of {span}, of which 1 is ours")
    where = (
        f"`{result['command']}`; {machine['processor']}, {machine['cores']} cores, torch {result['versions']['torch']}"
    )
    return f"* {name}: {'; '.join(words)} ({where})"
