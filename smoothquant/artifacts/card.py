"""The model card of a Hugging Face folder, README.md: the part that is written after the folder.

    <!-- measured -->
    what the last validation of the folder has measured
    <!-- end of measured -->

People edit a model card, and a validation adds its numbers. So the manifest lists it as a file of the folder, and does
not vouch for its content.
"""

from __future__ import annotations

import re

CARD = "README.md"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
MEASURED = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)


def measured(content: str) -> str:
    """The part of a card that says what was measured. content: Markdown."""
    return f"{BEGIN}\n{content.strip()}\n{END}"


def with_measured(card: str, content: str) -> str | None:
    """A card that says that something else was measured; None if it has no such part any more. content: Markdown."""
    return MEASURED.sub(lambda _: measured(content), card, count=1) if MEASURED.search(card) else None
