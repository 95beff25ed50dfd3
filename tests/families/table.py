"""Runs the table of layouts and properties and keeps what came out, for the README:  python -m tests.families.table"""

from __future__ import annotations

import sys

import pytest

from smoothquant.files import write_json
from smoothquant.outputs import versions
from tests.benchmarks.results import FOLDER, machine
from tests.families.properties import PROPERTIES
from tests.zoo import ZOO

NAME = "families"
TITLES = {  # of layouts, in the README
    "llama": "Llama 1, 2, 3",
    "llama-tied": "Llama 3.2, tied embeddings",
    "llama-biased": "Llama with biases",
    "llama-scaled": "Llama 3.1, scaled RoPE",
    "mistral": "Mistral, sliding window",
    "mistral-nemo": "Mistral Nemo, wide heads",
    "mixtral": "Mixtral",
    "mixtral-sliding": "Mixtral, sliding window",
    "falcon-7b": "Falcon 7B",
    "falcon-40b": "Falcon 40B, 180B",
    "falcon-11b": "Falcon 11B",
    "falcon-rw": "Falcon RW",
    "falcon-rw-16-heads": "Falcon RW, 16 heads",
    "opt": "OPT",
    "opt-350m": "OPT 350M, post-norm",
    "bloom": "BLOOM",
    "bloom-6-heads": "BLOOM, 6 heads",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2-sliding": "Qwen2, sliding windows",
    "qwen3": "Qwen3",
    "qwen3-tied": "Qwen3, tied embeddings",
    "qwen3-yarn": "Qwen3, YaRN",
    "qwen3-moe": "Qwen3, 128 experts",
    "qwen3-moe-unnormed": "Qwen3, 16 experts, shares as they are",
    "phi3": "Phi-3, Phi-4",
    "phi3-sliding": "Phi-3, sliding window",
    "phi3-partial": "Phi-3, partly rotated",
    "phi3-longrope": "Phi-3 128k, short LongRoPE",
    "phi3-longrope-long": "Phi-3 128k, long LongRoPE",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "granite": "Granite 3",
    "olmo2": "OLMo 2",
}
MARKS = {"passed": "✓", "skipped": "-", "failed": "✗"}


class Outcomes:
    """A pytest plugin. found: layout -> property -> "passed", "failed" or "skipped"."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {layout: {} for layout in ZOO}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            layout, _, name = report.nodeid.partition("[")[2].rstrip("]").rpartition("-")
            self.found[layout][name] = report.outcome


def main() -> None:
    outcomes = Outcomes()
    status = pytest.main(["-q", "tests/families/test_families.py", *sys.argv[1:]], plugins=[outcomes])
    ordered = {n: {name: found[name] for name in PROPERTIES if name in found} for n, found in outcomes.found.items()}
    content = {
        "command": "python -m tests.families.table",
        "machine": machine(),
        "versions": versions(),
        "outcomes": ordered,
    }
    write_json(FOLDER / f"{NAME}.json", content)
    sys.exit(status)


def table(outcomes: dict[str, dict[str, str]]) -> str:
    """Markdown. Raises ValueError if the outcomes are not those of today's layouts and properties."""
    if list(outcomes) != list(ZOO) or any(list(found) != list(PROPERTIES) for found in outcomes.values()):
        raise ValueError("the table of families is out of date: python -m tests.families.table")
    lines = ["| | " + " | ".join(PROPERTIES) + " |", "|---|" + "---|" * len(PROPERTIES)]
    for layout, found in outcomes.items():
        lines.append(f"| {TITLES[layout]} | " + " | ".join(MARKS[found[name]] for name in PROPERTIES) + " |")
    return "\n".join(lines) + "\n"


TARGETS = {  # what a user exports to -> the properties that prove it
    "smoothed checkpoint": ("hf",),
    "W8A8: transformers, vLLM": ("w8a8", "w8a8 static"),
    "ONNX Runtime": ("onnx float", "onnx linears", "onnx model", "engine"),
    "ONNX Runtime, side by side": ("grouped",),
    "OpenVINO": ("openvino",),
    "TensorRT (compiles)": ("tensorrt",),
    "TensorRT-LLM (checkpoint)": ("tensorrt llm",),
}


def targets(outcomes: dict[str, dict[str, str]]) -> str:
    """Markdown: which targets take which layout."""
    lines = ["| | " + " | ".join(TARGETS) + " |", "|---|" + "---|" * len(TARGETS)]
    for layout, found in outcomes.items():
        marks = (MARKS[max((found[name] for name in names), key=list(MARKS).index)] for names in TARGETS.values())
        lines.append(f"| {TITLES[layout]} | " + " | ".join(marks) + " |")
    return "\n".join(lines) + "\n"


def meanings() -> str:
    """What each property proves: the first sentence of its docstring."""
    sentences = {name: " ".join((check.__doc__ or "").split()).split(". ")[0] for name, check in PROPERTIES.items()}
    return "".join(f"* **{name}**: {sentence.rstrip('.')}.\n" for name, sentence in sentences.items())


if __name__ == "__main__":
    main()
