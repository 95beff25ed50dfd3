"""Pages as their tests read them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

EVIL = '<img src=x onerror="alert(1)">&amp;\'"</style></title><script>alert(2)</script>{{ 7 * 7 }}'
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; complains about tags that do not close."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def check_alone(content: str) -> Page:
    """The page, which loads nothing."""
    page = Page(content)
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
    assert not loading & {name for name, _ in page.attributes}
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    for loads in ("http", "@import", "url("):
        assert loads not in content
    return page


def svgs(content: str) -> list[str]:
    """The pictures of a page."""
    return re.findall(r"<svg .*?</svg>", content, re.S)


def check_frame(picture: str) -> ElementTree.Element:
    """A picture, which is well formed and has its lines inside its frame."""
    tree = ElementTree.fromstring(picture)
    _, _, width, height = (float(number) for number in tree.attrib["viewBox"].split())
    assert tree.attrib["aria-label"]
    for path in tree.iter("path"):
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attrib["d"]):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
    return tree
