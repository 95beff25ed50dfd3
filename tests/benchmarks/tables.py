"""Writes the generated parts of the documents from results/*.json:  python -m tests.benchmarks.tables [--check]

A part lies between `<!-- generated: NAME -->` and `<!-- end -->`; a picture is a file of its own. With --check nothing
is written, and the exit status is 1 if a document is not what the results make.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from recipes.models import RECIPES
from tests.benchmarks import (
    cache_traffic,
    edge_llm_nodes,
    gpu,
    largest_table,
    onnx_forms,
    readers,
    real_table,
    serve_plot,
    team_traffic,
    trtllm_forms,
)
from tests.benchmarks import quantizers as quantizers_table
from tests.benchmarks.peers import show as peers_table
from tests.benchmarks.results import FOLDER
from tests.families import table as families_table

ROOT = Path(__file__).parents[2]
ORDER = (
    "engine_speed",
    "generate_speed",
    "serve_speed",
    "serve_speed_2048",
    "serve_load",
    "batching",
    "int8_cache",
    "export_memory",
    "memory_budget",
    "one_pass",
    "validate_speed",
    "integrity_cost",
    "trtllm_ranks",
    "calibration_speed",
    "team_speed",
    "search_cost",
    "tensorrt_rtx",
    "tensorrt_host",
    "demo",
)
PACKAGES = ("torch", "onnxruntime", "transformers", "llmcompressor")


def main() -> None:
    stale = []
    for name, parts in DOCUMENTS.items():
        path = ROOT / name
        text = made = path.read_text(encoding="utf-8")
        for part, make in parts.items():
            pattern = re.compile(rf"(<!-- generated: {part} -->\n).*?(<!-- end -->)", re.DOTALL)
            content = make()
            made = pattern.sub(lambda match, content=content: f"{match[1]}{content}{match[2]}", made)
        if made != text and "--check" in sys.argv:
            stale.append(name)
        elif made != text:
            path.write_text(made, encoding="utf-8")
    for name, draw in PICTURES.items():
        path, content = ROOT / name, draw()
        if "--check" not in sys.argv:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(name)
    if stale:
        sys.exit(f"{', '.join(stale)}: not what results/ make: python -m tests.benchmarks.tables")


def demo() -> str:
    """What the demonstration printed."""
    output = result("demo")["details"]["output"]
    lines = [line.rstrip() for line in output.splitlines()]
    return "```\n" + "\n".join(lines).strip("\n") + "\n```\n"


def benchmarks() -> str:
    """A table with a line per measurement, and under it where and how they were made."""
    lines = ["| | measured | target |", "|---|---|---|"]
    notes = []
    for name in ORDER:
        found = result(name)
        lines += [f"| {row['what']} | {row['measured']} | {row['target']} |" for row in found["rows"]]
        versions = ", ".join(
            f"{package} {found['versions'][package]}" for package in PACKAGES if package in found["versions"]
        )
        machine = found["machine"]
        where = f"{machine['processor']}, {machine['cores']} cores, {', '.join(machine['features'][:3])}"
        notes.append(f"* `{found['command']}` ({where}; {versions})")
    return "\n".join([*lines, "", *notes]) + "\n"


def forms() -> str:
    """The forms of an ONNX export, side by side."""
    return onnx_forms.table(result("onnx_forms")["details"])


def checkpoints() -> str:
    """The forms of a TensorRT-LLM checkpoint, side by side."""
    return trtllm_forms.table(result("trtllm_forms")["details"])


def peers() -> str:
    """Engines for CPUs beside each other."""
    if not _peers():
        return peers_table.first_table(result("peers"))
    accuracy = result("peers_accuracy") if (FOLDER / "peers_accuracy.json").exists() else None
    return "\n".join(peers_table.table(found, accuracy) for found in _peers())


def peers_drawn() -> str:
    """Their tokens per second by the size of the batch."""
    return peers_table.picture(_peers())


def _peers() -> list[dict]:
    return [result(name) for name in ("peers_2048", "peers_4096") if (FOLDER / f"{name}.json").exists()]


def float_budget() -> str:
    """Bytes in float against accuracy, on real weights."""
    found = result("float_budget")
    details = found["details"]
    lines = [
        "| `--act per-tensor --keep-float` | in float | KL to FP16 | perplexity | top-1 |",
        "|---|---|---|---|---|",
    ]
    for choice, one in details["choices"].items():
        ratio, top1 = one["perplexity_ratio"] - 1, one["top1"]
        lines.append(f"| {choice} | {one['share']:.1%} | {one['kl_mean']:.4f} | {ratio:+.2%} | {top1:.1%} |")
    where = f"SmolLM2-135M-Instruct (dequantized from Q4_1), alpha {details['alpha']}, {details['tokens']:,} tokens of"
    return "\n".join([*lines, "", f"({where} WikiText-2 test; `{found['command']}`)"]) + "\n"


def real_weights() -> str:
    """W8A8 forms of models with real weights."""
    return real_table.table({name: result(name) for name in real_table.MODELS})


def vllm_perplexity() -> str:
    """The perplexity of real weights in vLLM, beside our own arithmetic."""
    found = result("vllm_perplexity")
    lines = ["| SmolLM2-135M-Instruct (dequantized from Q4_1), 8 x 512 tokens of WikiText-2 test | |", "|---|---|"]
    lines += [f"| {row['what']} | {row['measured']}{_wanted(row)} |" for row in found["rows"]]
    machine, versions = found["machine"], found["versions"]
    lines += [
        "",
        f"({machine['processor']}, {machine['cores']} cores; torch {versions['torch']}, {found['details']['vllm']};",
    ]
    return "\n".join([*lines, f"`{found['command']}`)"]) + "\n"


def triton() -> str:
    """What a real tritonserver made of the repositories, as its tests found it."""
    found = result("servers")["triton"]
    lines = ["| | | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in found["rows"])]
    return "\n".join([*lines, "", f"({', '.join(found['requirements'])}; `{found['command']}`)"]) + "\n"


def container() -> str:
    """What the steps of the serving image made, and how a container of it ran."""
    found = result("servers")["container"]
    lines = ["| | |", "|---|---|", *(f"| {' | '.join(row)} |" for row in found["rows"])]
    machine = found["machine"]
    return "\n".join([*lines, "", f"({machine['processor']}, {machine['cores']} cores; `{found['command']}`)"]) + "\n"


def _wanted(row: dict) -> str:
    return f" ({row['target']} wanted)" if row["target"] else ""


def families() -> str:
    """Every layout by every property, as the tests found them."""
    return families_table.table(result("families")["outcomes"])


def targets() -> str:
    """Which targets take which layout."""
    return families_table.targets(result("families")["outcomes"])


def models() -> str:
    """Every recipe: model, alpha, what was published, and the command that measures it again."""
    lines = [
        "| recipe | model on the Hub | alpha | says | FP16 | W8A8 |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        numbers = recipe.published
        published = f"{numbers.fp16:.3f} | {numbers.w8a8:.3f}" if numbers else " | "
        model = recipe.model or f"any {recipe.family.name}"
        lines.append(f"| `{recipe.name}` | {model} | {recipe.alpha} | {recipe.alpha_from} | {published} |")
    return "\n".join(lines) + "\n"


def quantizers() -> str:
    """What `validate` made of other quantizers' folders."""
    return quantizers_table.table(result("servers"))


def served() -> str:
    """Throughput beside vLLM."""
    return serve_plot.picture([result(name) for name in ("serve_speed", "serve_speed_2048")])


def nodes() -> str:
    """Our graph beside NVIDIA's own, node by node."""
    return edge_llm_nodes.table(result("edge_llm_nodes")["details"])


def result(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "demo": demo,
        "benchmarks": benchmarks,
        "float budget": float_budget,
        "real weights": real_weights,
        "onnx forms": forms,
        "peers": peers,
        "trtllm forms": checkpoints,
        "families": families,
        "quantizers": quantizers,
        "team traffic": team_traffic.table,
    },
    "builders/serving/README.md": {
        "vllm perplexity": vllm_perplexity,
        "triton": triton,
        "readers": readers.table,
        "reader runs": readers.runs,
    },
    "docker/README.md": {
        "container": container,
        "cache traffic": cache_traffic.table,
        "gpu": gpu.table,
        "edge-llm nodes": nodes,
    },
    "recipes/README.md": {
        "meanings": families_table.meanings,
        "targets": targets,
        "models": models,
        "largest": largest_table.table,
    },
}

PICTURES: dict[str, Callable[[], str]] = {
    "tests/benchmarks/results/serve_speed.svg": served,
    **({"tests/benchmarks/results/peers.svg": peers_drawn} if _peers() else {}),
}

if __name__ == "__main__":
    main()
