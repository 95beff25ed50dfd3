"""Documents of a text file, of JSON lines or of a Hugging Face dataset, read only as far as they are used.

    FILE.txt                        one document: the whole file, UTF-8
    FILE.jsonl, FILE.jsonl.zst      one document per line, as `act_scales.rows` finds it there
    hf:ORG/NAME[/CONFIG][:SPLIT]    one document per row of a dataset, found alike; "train" is the default

A dataset needs its `hf:`, so that a mistyped path never becomes a download. Rows without text are skipped.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from act_scales.rows import Conversation, read_row
from smoothquant.errors import UserError, raise_refusal
from smoothquant.packages import require
from smoothquant.reading import parse_json

Document = Iterable[str] | Conversation  # the text of one document, in parts; or turns, which become a text later
LONGEST = 1 << 25  # characters in a line: a library of books in one
CHUNK = 1 << 16  # characters, or compressed bytes, read at a time
DATASET = re.compile(r"hf:(?P<name>[^/:]+/[^/:]+)(/(?P<config>[^:]+))?(:(?P<split>.+))?")
SPELLINGS = "a .txt, .jsonl or .jsonl.zst file, or hf:ORG/NAME[/CONFIG][:SPLIT]"


def documents(source: str | Path, field: str | None = None, *, blank: bool = False) -> Iterator[Document]:
    """The documents of a source, in order. field: where rows have their text. blank: also those without text.

    Raises UserError, which names the file and line, here or while a document is read: the file is missing, of an
    unknown kind, not UTF-8, malformed, corrupt or truncated; a row has no text; a dataset cannot be loaded.
    Raises MissingPackageError without zstandard or datasets.
    """
    name = Path(source).name.lower()
    if name.endswith(".txt") and not str(source).startswith("hf:"):
        yield _characters(Path(source))
        return
    for row, where in _rows(source):
        document = read_row(row, where, field)
        if isinstance(document, Conversation):
            yield document
        elif blank or document.strip():
            yield (document,)


def _rows(source: str | Path) -> Iterator[tuple[Any, str]]:
    """Rows, and where each stands."""
    path = Path(source)
    name = path.name.lower()
    if str(source).startswith("hf:"):
        for number, row in enumerate(_dataset(str(source)), start=1):
            yield row, f"{source} row {number}"
    elif name.endswith(".jsonl"):
        with _reading(path), open(path, encoding="utf-8-sig") as file:
            yield from _json_lines(_lines(iter(lambda: file.read(CHUNK), ""), path), path)
    elif name.endswith(".jsonl.zst"):
        with _reading(path):
            yield from _json_lines(_lines(codecs.iterdecode(_decompressed(path), "utf-8-sig"), path), path)
    else:
        raise UserError(f"{path}: cannot tell what kind of text this is", expected=SPELLINGS)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})", do="convert it: iconv -t utf-8") from error
    except OSError as error:
        raise_refusal(error, path)
        raise UserError(f"{path}: cannot be read ({error.strerror or error})", expected=SPELLINGS) from error


def _characters(path: Path) -> Iterator[str]:
    with _reading(path), open(path, encoding="utf-8-sig") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})", expected="one JSON object per line") from error
        yield row, where


def _lines(chunks: Iterable[str], path: Path) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from whole
        if len(rest) > LONGEST:  # as /dev/zero is
            raise UserError(f"{path}: a line of more than {LONGEST} characters", expected="one JSON object per line")
    yield rest


def _decompressed(path: Path) -> Iterator[bytes]:
    """The content of a .zst file, frame by frame. (zstandard's own reader accepts a truncated frame as a whole one.)"""
    zstandard = require("zstandard", f"{path}: reading .zst needs zstandard")
    again = "download or compress it again"
    frame = zstandard.ZstdDecompressor().decompressobj()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            while chunk:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise UserError(f"{path}: corrupt ({error})", do=again) from error
                chunk = frame.unused_data
    if not frame.eof:
        raise UserError(f"{path}: truncated", do=again)


def _dataset(source: str) -> Iterator[Any]:
    match = DATASET.fullmatch(source)
    if not match:
        raise UserError(f"{source}: not the name of a dataset", expected="hf:ORG/NAME[/CONFIG][:SPLIT]")
    datasets = require("datasets", f"{source} needs the package datasets")
    streaming = not datasets.config.HF_HUB_OFFLINE  # a stream downloads what is used; offline, only the cache exists
    try:
        yield from datasets.load_dataset(
            match["name"], match["config"], split=match["split"] or "train", streaming=streaming
        )
    except Exception as error:  # datasets and the hub raise many kinds here: network, name, config, split, format
        raise UserError(
            f"{source}: cannot be loaded ({_first_line(error)})",
            expected="a dataset on the Hugging Face hub, or in its cache",
            do="check name, config, split and network, or give a text file",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
