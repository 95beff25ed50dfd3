"""The documents of the task `rows`, and its measure: the perplexity of tokens 2..n of every row."""

from __future__ import annotations

import json
import os
from pathlib import Path

from datasets import Dataset

FILE = "SMOOTHQUANT_ROWS"  # environment variable: a file with a JSON list of rows, each a list of token ids


def rows(**_: object) -> dict[str, Dataset]:
    """Each row: its first token, and behind a space the others, for the client puts the two texts together."""
    found = json.loads(Path(os.environ[FILE]).read_text(encoding="utf-8"))
    documents = [{"first": str(row[0]), "rest": "".join(f" {token}" for token in row[1:])} for row in found]
    return {"test": Dataset.from_list(documents)}


def process_results(document: dict[str, str], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """The log-probability of a row, and its weight, the number of its predicted tokens."""
    [(logprob, _)] = results
    return {"token_perplexity": (logprob, len(document["rest"].split()))}
