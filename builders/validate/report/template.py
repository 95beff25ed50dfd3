"""Fill a template: one HTML page that holds its style and plots, has no scripts and loads nothing.

layout.html.jinja   what all pages have: the head, and the macros for plots
style.css           how its texts and tables look
colours.css         the colours of page and plots, for light and for dark screens
marks.css           how the marks of plots look
"""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

NO_CHARACTER = re.compile(r"[^\t\n\r -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # controls, lone surrogates
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def filled(template: str, mark: str, **shown: object) -> str:
    """The text of the whole page. mark: by which we know a page of ours. shown: the names that the template uses."""
    content = TEMPLATES.get_template(template).render(mark=mark, **shown)
    return NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", content)
