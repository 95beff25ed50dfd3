"""What a command reads and what it writes, by the names of its options: the two are kept apart.

An output that is an input, holds one or lies inside one is refused before any work, whatever --overwrite says.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

READ = {  # attribute of the parsed arguments -> what it is
    "model": "the model",
    "reference": "the model",
    "act_scales": "the act scales",
    "plan": "the plan",
    "scales": "the act scales",
    "file": "the act scales",
    "folder": "the folder",
    "export": "the export",
    "checkpoint": "the checkpoint",
    "engine": "the engine",
    "engines": "an engine",
    "text": "the text",
    "heldout": "the held-out text",
    "family": "the family record",
    "tokenizer": "the tokenizer",
}
WRITTEN = {"out": "--out", "report": "--report"}


def check(arguments: argparse.Namespace) -> None:
    """Raise OutputError for an output that is not apart from all inputs."""
    given = {option: path for attribute, option in WRITTEN.items() if (path := getattr(arguments, attribute, None))}
    if not given:
        return
    from smoothquant.outputs import check_apart

    inputs = dict(_inputs(arguments))
    for option, path in given.items():
        check_apart(path, inputs, option)


def _inputs(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Inputs that exist, by what they are; several of a kind are numbered."""
    for attribute, what in READ.items():
        found = getattr(arguments, attribute, None)
        for number, path in enumerate(found if isinstance(found, list) else [found]):
            if isinstance(path, str) and os.path.exists(path):
                yield (what if not number else f"{what} ({number + 1})"), path
