"""The table of what `smoothquant validate` made of other quantizers' folders (`python -m tests.servers`)."""

from __future__ import annotations

from tests.families.table import TITLES

TOOLS = {"llm-compressor": "llm-compressor", "auto-round": "AutoRound"}  # by the names of their environments


def table(servers: dict) -> str:
    """Markdown. servers: the content of results/servers.json."""
    lines = ["| | model (random) | form | `validate` |", "|---|---|---|---|"]
    for name, title in TOOLS.items():
        tool = f"{title} {servers[name]['requirements'][0].partition('==')[2]}"
        rows = servers[name]["rows"]
        lines += [f"| {tool} | {TITLES[layout]} | {form} | {found} |" for layout, form, found in rows]
    return "\n".join(lines) + "\n"
