"""Throughput of `smoothquant serve` and vLLM by the number of clients, as one picture for README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from builders.validate.report.picture import Picture
from builders.validate.report.svg import Axis, Panel, series
from tests.benchmarks.serve_speed import CELLS, OURS, THEIRS, runs_of


def picture(results: Sequence[Mapping]) -> str:
    """The picture as SVG, a plot for each model and length of prompts. results: of `serve_speed`."""
    colours = series((OURS, THEIRS))
    plots = [
        _plot(result["details"]["model"], result["details"]["runs"], prompt, colours)
        for result in results
        for prompt in dict.fromkeys(prompt for _, prompt in CELLS)
    ]
    return Picture(*plots, title="new tokens per second", legend=colours).svg() + "\n"


def _plot(model: str, runs: Sequence[Mapping], prompt: int, colours: Mapping[str, str]) -> str:
    clients = [number for number, length in CELLS if length == prompt]
    lines = {
        name: [
            (float(number), median(run["output_throughput"] for run in runs_of(runs, name, number, prompt)))
            for number in clients
        ]
        for name in colours
    }
    most = max(speed for line in lines.values() for _, speed in line)
    x = Axis(f"clients, with prompts of {prompt} tokens", clients[0] * 0.9, clients[-1] * 1.1, log=True)
    panel = Panel(model, x, Axis("tokens per second", 0, 1.1 * most))
    for name, css in colours.items():
        panel.line(lines[name], css, name, dots=True)
    return panel.svg()
