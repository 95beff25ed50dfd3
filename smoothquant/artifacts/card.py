"""The model card of a Hugging Face folder, README.md: the part that is written after the folder.

    <!-- measured -->
    what the last validation of the folder has measured
    <!-- end of measured -->

People edit a model card, and a validation adds its numbers. So the manifest lists it as a file of the folder, and does
not vouch for its content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

CARD = "README.md"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
MEASURED = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
NUMBER = r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
NUMBERS: Mapping[str, str] = {  # what a validation has measured -> where `builders.validate.card` writes it
    "perplexity": rf"\| perplexity \| {NUMBER},",
    "reference_perplexity": rf"\| perplexity \| [^|]*, {NUMBER} for the model",
    "kl_mean": rf"\| KL to the model[^|]*\| mean {NUMBER},",
    "kl_p99": rf"\| KL to the model[^|]*\|[^|]*percentile {NUMBER} \|",
    "top1_percent": rf"\| top-1 agreement \| {NUMBER}% \|",
}


def measured(content: str) -> str:
    """The part of a card that says what was measured. content: Markdown."""
    return f"{BEGIN}\n{content.strip()}\n{END}"


def with_measured(card: str, content: str) -> str | None:
    """A card that says that something else was measured; None if it has no such part any more. content: Markdown."""
    return MEASURED.sub(lambda _: measured(content), card, count=1) if MEASURED.search(card) else None


def read_measured(card: str) -> dict[str, float] | None:
    """What the last validation has measured, by the names of `NUMBERS`; None for a card that does not tell all of it.

    What a person has changed in the card is told as it stands there.
    """
    place = MEASURED.search(card)
    found = {name: re.search(pattern, place[0]) for name, pattern in NUMBERS.items()} if place else {}
    numbers = {name: float(each[1]) for name, each in found.items() if each}
    return numbers if found and len(numbers) == len(found) else None
