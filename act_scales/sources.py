"""Documents of a text file, of JSON lines or of a Hugging Face dataset, read only as far as they are used.

    FILE.txt                        one document: the whole file, UTF-8
    FILE.jsonl, FILE.jsonl.zst      one document per line: its field "text", or its first field that is a string
    hf:ORG/NAME[/CONFIG][:SPLIT]    one document per row of a dataset, from the same fields; "train" is the default

A dataset needs its `hf:`, so that a mistyped path never becomes a download. Rows without text are skipped.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smoothquant.errors import UserError
from smoothquant.packages import require

Document = Iterable[str]  # the text of one document, in parts
CHUNK = 1 << 16  # characters, or compressed bytes, read at a time
DATASET = re.compile(r"hf:(?P<name>[^/:]+/[^/:]+)(/(?P<config>[^:]+))?(:(?P<split>.+))?")
SPELLINGS = "a .txt, .jsonl or .jsonl.zst file, or hf:ORG/NAME[/CONFIG][:SPLIT]"


def documents(source: str | Path, *, blank: bool = False) -> Iterator[Document]:
    """The documents of a source, in order. blank: also those without text.

    Raises UserError, which names the file and line, here or while a document is read: the file is missing, of an
    unknown kind, not UTF-8, malformed, corrupt or truncated; a row has no string; a dataset cannot be loaded.
    Raises MissingPackageError without zstandard or datasets.
    """
    path = Path(source)
    name = path.name.lower()
    if str(source).startswith("hf:"):
        yield from _dataset(str(source), blank)
    elif name.endswith(".txt"):
        yield _characters(path)
    elif name.endswith(".jsonl"):
        with _reading(path), open(path, encoding="utf-8-sig") as file:
            yield from _json_lines(file, path, blank)
    elif name.endswith(".jsonl.zst"):
        with _reading(path):
            yield from _json_lines(_lines(codecs.iterdecode(_decompressed(path), "utf-8-sig")), path, blank)
    else:
        raise UserError(f"{path}: cannot tell what kind of text this is", expected=SPELLINGS)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})", do="convert it: iconv -t utf-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})", expected=SPELLINGS) from error


def _characters(path: Path) -> Iterator[str]:
    with _reading(path), open(path, encoding="utf-8-sig") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _json_lines(lines: Iterable[str], path: Path, blank: bool) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not JSON ({error})", expected="one JSON object per line") from error
        yield from _row(row, f"{path} line {number}", blank)


def _row(row: Any, where: str, blank: bool) -> Iterator[Document]:
    text = None
    if isinstance(row, Mapping):
        strings = (value for value in row.values() if isinstance(value, str))
        text = row["text"] if isinstance(row.get("text"), str) else next(strings, None)
    if text is None:
        raise UserError(
            f"{where}: no text in it", expected='an object whose field "text", or any other field, is a string'
        )
    if blank or text.strip():
        yield (text,)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from whole
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


def _dataset(source: str, blank: bool) -> Iterator[Document]:
    for number, row in enumerate(_rows(source), start=1):
        yield from _row(row, f"{source} row {number}", blank)


def _rows(source: str) -> Iterator[Any]:
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
