"""Documents out of a text file, JSON lines or a Hugging Face dataset, read only as far as they are used.

    FILE.txt                        one document: the whole file, UTF-8
    FILE.jsonl, FILE.jsonl.zst      one document per line: its field "text", or its first field that is a string
    hf:ORG/NAME[/CONFIG][:SPLIT]    one document per row of a dataset, same fields; split "train" unless named

`hf:` is spelled out so that a mistyped path never becomes a download. Rows without text are passed over.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from smoothquant.errors import MissingPackageError, UserError

Document = Iterable[str]  # the text of one document, in parts
CHUNK = 1 << 16  # characters read from a .txt at a time
DATASET = re.compile(r"hf:(?P<name>[^/:]+/[^/:]+)(/(?P<config>[^:]+))?(:(?P<split>.+))?")
SPELLINGS = "a .txt, .jsonl or .jsonl.zst file, or hf:ORG/NAME[/CONFIG][:SPLIT]"


def documents(source: str | Path) -> Iterator[Document]:
    """The documents of a source, in order. Each must be used up before the next one is asked for.

    Raises UserError, naming the file and line: no such file, unknown kind, not UTF-8, malformed or corrupt, a row
    without a string, a dataset that cannot be loaded; MissingPackageError without zstandard or datasets.
    """
    if str(source).startswith("hf:"):
        yield from _dataset(str(source))
        return
    path = Path(source)
    name = path.name.lower()
    try:
        if name.endswith(".txt"):
            with open(path, encoding="utf-8-sig") as file:
                yield iter(lambda: file.read(CHUNK), "")
        elif name.endswith(".jsonl"):
            with open(path, encoding="utf-8-sig") as file:
                yield from _json_lines(file, path)
        elif name.endswith(".jsonl.zst"):
            with _decompressed(path) as file:
                yield from _json_lines(file, path)
        else:
            raise UserError(f"{path}: cannot tell what kind of text this is", expected=SPELLINGS)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})", do="convert it: iconv -t utf-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})", expected=SPELLINGS) from error


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not JSON ({error})", expected="one JSON object per line") from error
        yield from _row(row, f"{path} line {number}")


def _row(row: Any, where: str) -> Iterator[Document]:
    text = None
    if isinstance(row, Mapping):
        strings = (value for value in row.values() if isinstance(value, str))
        text = row["text"] if isinstance(row.get("text"), str) else next(strings, None)
    if text is None:
        raise UserError(
            f"{where}: no text in it", expected='an object with a field "text", or another that is a string'
        )
    if text.strip():
        yield (text,)


def _decompressed(path: Path) -> io.TextIOWrapper:
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackageError(
            f"{path}: reading .zst needs zstandard", do='pip install "smoothquant-toolchain[datasets]"'
        ) from error

    class Reader(io.RawIOBase):
        """zstandard's reader, whose own error for a corrupt file is not an OSError."""

        def __init__(self) -> None:
            self.file = open(path, "rb")  # noqa: SIM115 (closed with the reader)
            self.stream = zstandard.ZstdDecompressor().stream_reader(self.file, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return self.stream.readinto(buffer)
            except zstandard.ZstdError as error:
                raise UserError(f"{path}: corrupt ({error})", do="download or compress it again") from error

        def close(self) -> None:
            self.file.close()
            super().close()

    return io.TextIOWrapper(io.BufferedReader(Reader()), encoding="utf-8-sig")


def _dataset(source: str) -> Iterator[Document]:
    match = DATASET.fullmatch(source)
    if not match:
        raise UserError(f"{source}: not the name of a dataset", expected="hf:ORG/NAME[/CONFIG][:SPLIT]")
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"{source} needs the package datasets", do='pip install "smoothquant-toolchain[datasets]"'
        ) from error
    split = match["split"] or "train"
    streaming = not datasets.config.HF_HUB_OFFLINE  # a stream takes what is used; offline there is the cache alone
    try:
        rows = iter(datasets.load_dataset(match["name"], match["config"], split=split, streaming=streaming))
        row = next(rows, None)
    except Exception as error:  # datasets and the hub raise many kinds here: network, name, config, split, format
        raise UserError(
            f"{source}: cannot be loaded ({_first_line(error)})",
            expected="a dataset on the Hugging Face hub, or in its cache",
            do="check name, config, split and network, or give a text file",
        ) from error
    number = 0
    while row is not None:
        number += 1
        yield from _row(row, f"{source} row {number}")
        row = next(rows, None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
