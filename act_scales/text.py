"""Text as token sequences, for calibration and for evaluation.

    document -> special tokens before, tokens of the text, special tokens after   (as the tokenizer itself adds them)
    all documents one after another -> cut every `length` tokens -> the first `samples` sequences

There is no padding: where the text ends early, the last sequence is shorter. A long document is tokenized in pieces
of at most 65,536 characters. A piece ends where a token of a byte-level tokenizer ends: after a line, else before a
space. A tokenizer that puts a space in front of every text changes one token per piece.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act_scales.sources import documents
from smoothquant.errors import UserError
from smoothquant.model import Model

MINIMUM = 32  # tokens; fewer say nothing about a model's activations
PIECE = 1 << 16  # characters tokenized at a time
LINE_END = re.compile(r"\S\n(?=\S)")
WORD_END = re.compile(r"\S(?=\s\S)")

RESTORE = "copy tokenizer.json and tokenizer_config.json from where the model came from"

Encode = Callable[[str, bool], list[int]]  # (text, with special tokens) -> ids


@dataclass(frozen=True, eq=False)
class Text:
    """Token sequences and their source. sequences: each (tokens,) int64; all but the last have one length."""

    sequences: tuple[Tensor, ...]
    source: str

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence) for sequence in self.sequences)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the length and the token ids of every sequence, 16 hex digits."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(f"{len(sequence)} ".encode())
            digest.update(sequence.to(torch.int64).numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def for_model(self, model: Model) -> Text:
        """This text. Raises UserError if the model lacks one of its tokens, or has fewer positions than a sequence."""
        largest = max(int(sequence.max()) for sequence in self.sequences)
        if largest >= model.geometry.vocab_size:
            raise UserError(
                f"{self.source} has token id {largest}",
                expected=f"ids below {model.geometry.vocab_size}, this model's vocabulary",
                do="use the tokenizer that came with the model",
            )
        if self.length > model.geometry.max_positions:
            raise UserError(
                f"sequences of {self.length} tokens",
                expected=f"at most {model.geometry.max_positions}, this model's positions",
                do="choose a shorter length" + (", or a --max-length that allows it" if model.choices else ""),
            )
        return self


def load_text(source: str | Path, tokenizer_folder: str | Path, samples: int, length: int) -> Text:
    """The first `samples` sequences of `length` tokens. A short text gives fewer, and the last one is shorter.

    source: as in `act_scales.sources`; it is read no further than needed. tokenizer_folder: a Hugging Face model
    folder. Raises UserError if the source cannot be read, if the folder has no usable tokenizer, or if the text has
    fewer than 32 tokens.
    """
    if samples < 1 or length < 1:
        raise UserError(f"{samples} samples of {length} tokens", expected="at least 1 of at least 1")
    sequences = pack(token_stream(documents(source), _encoder(Path(tokenizer_folder))), samples, length)
    text = Text(sequences, source=_name(source))
    needed = min(MINIMUM, samples * length)
    if text.tokens < needed:
        raise UserError(
            f"{source}: {text.tokens} tokens of text",
            expected=f"at least {needed} of the {samples} x {length} asked for",
            do="give a longer text",
        )
    return text


def load_document(source: str | Path, tokenizer_folder: str | Path, samples: int, length: int) -> Text:
    """The sequences of a source that is tokenized as one document: its rows, joined by blank lines.

    Blank rows are joined too. WikiText's perplexities are measured in this way. Raises UserError if the source cannot
    be read or has no text, or if the folder has no usable tokenizer.
    """
    if samples < 1 or length < 2:
        raise UserError(f"{samples} samples of {length} tokens", expected="at least 1 of at least 2")
    encode = _encoder(Path(tokenizer_folder))
    ids = encode("\n\n".join("".join(document) for document in documents(source, blank=True)), True)
    text = Text(pack([ids], samples, length), source=_name(source))
    if not text.tokens:
        raise UserError(f"{source}: no text in it", do="give a longer text")
    return text


def token_stream(documents: Iterable[Iterable[str]], encode: Encode) -> Iterator[Sequence[int]]:
    """Token ids of all documents, in order and in parts. Each document stands between its special tokens."""
    before, after = _special_tokens(encode)
    for document in documents:
        yield before
        for piece in pieces(document):
            yield encode(piece, False)
        yield after


def pack(stream: Iterable[Sequence[int]], samples: int, length: int) -> tuple[Tensor, ...]:
    """At most `samples` int64 sequences of `length` tokens. The stream is read no further than they need."""
    ids: list[int] = []
    for part in stream:
        ids += part
        if len(ids) >= samples * length:
            break
    return torch.tensor(ids[: samples * length], dtype=torch.int64).split(length)


def pieces(chunks: Iterable[str], limit: int = PIECE) -> Iterator[str]:
    """The text in pieces of at most `limit` characters, cut where tokens end."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > limit:
            cut = _last(LINE_END, rest, limit) or _last(WORD_END, rest, limit) or limit
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _name(source: str | Path) -> str:
    return str(source) if str(source).startswith("hf:") else Path(source).name


def _last(pattern: re.Pattern[str], text: str, limit: int) -> int:
    return max((match.end() for match in pattern.finditer(text, limit // 2, limit)), default=0)


def _special_tokens(encode: Encode) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    plain, whole = encode("a", False), encode("a", True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model or engine folder, as transformers loads it. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder", expected="a model folder with its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # every kind of tokenizer raises its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: no usable tokenizer in it ({reason})", do=RESTORE) from error


def _encoder(folder: Path) -> Encode:
    tokenizer = load_tokenizer(folder)

    def encode(text: str, special: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    if not encode("a", False):
        raise UserError(f"{folder}: its tokenizer gives no tokens for a text", do=RESTORE)
    return encode
