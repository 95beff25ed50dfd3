"""Text as token sequences, for calibration and for evaluation.

    document -> special tokens before, tokens of the text, special tokens after   (as the tokenizer itself adds them)
    conversation -> tokens of what the model's chat template makes of it
    all documents one after another -> cut into sequences of `length` tokens -> the first `samples` of them

Every sequence begins with the special tokens that the tokenizer puts before a text, as the model was trained: some
(Gemma) predict little without. They count into `length`. A sequence that begins with them by itself, as where a
document begins, does not get them again.

There is no padding: where the text ends early, the last sequence is shorter. A long document is tokenized in pieces
of at most 65,536 characters. A piece ends where a token of a byte-level tokenizer ends: after a line, else before a
space. A tokenizer that puts a space in front of every text changes one token per piece.

`Text.doubts` says what a text is too poor for. A channel's range is its largest value over n tokens. If tokens to come
are like these, each is as likely as any of the n to be the largest: one in n + 1 lies beyond the range, which a static
scale clips. With `ENOUGH` tokens that is one in a thousand. Diversity is exp(-sum p ln p) over the shares p of the
tokens: k tokens of equal shares have diversity k. English has above 18, even letter by letter, and some hundreds by
words; a repeated line has what the line has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from act_scales.rows import Conversation
from act_scales.sources import Document, documents
from act_scales.tokenizer import Encoder
from smoothquant.errors import UserError
from smoothquant.model import Model

MINIMUM = 32  # tokens; fewer say nothing about a model's activations
ENOUGH = 1000  # tokens; fewer leave every thousandth value, or more, beyond its range
DIVERSE = 15.0  # diversity of a text; less is the same few tokens again and again
PIECE = 1 << 16  # characters tokenized at a time
LINE_END = re.compile(r"\S\n(?=\S)")
WORD_END = re.compile(r"\S(?=\s\S)")


@dataclass(frozen=True, eq=False)
class Text:
    """Token sequences and their source. sequences: each (tokens,) int64; all but the last have one length.

    refused: one line for each conversation that the chat template refused. sequence_start: the special tokens that
    every sequence begins with, as the tokenizer spells them; empty where it adds none, or was not asked to.
    """

    sequences: tuple[Tensor, ...]
    source: str
    refused: tuple[str, ...] = ()
    sequence_start: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence) for sequence in self.sequences)

    @property
    def diversity(self) -> float:
        """exp(entropy) of the tokens' shares: as many equally frequent tokens are as diverse as this text."""
        counts = torch.cat(self.sequences).unique(return_counts=True)[1].double()
        shares = counts / counts.sum()
        return (-(shares * shares.log()).sum()).exp().item()

    @property
    def doubts(self) -> tuple[str, ...]:
        """What a user should know before the text is relied on, one line each."""
        found = []
        if self.tokens < ENOUGH:
            found.append(
                f"{self.source}: {self.tokens} tokens are too little text: of tokens to come, one in {self.tokens} "
                f"lies beyond the range of any channel; use at least {ENOUGH:,}"
            )
        if self.diversity < DIVERSE:
            found.append(
                f"{self.source}: too uniform a text, no more diverse than {self.diversity:.1f} equally frequent tokens "
                f"(at least {DIVERSE:.0f} wanted); use text like what the model will serve"
            )
        if self.refused:
            found.append(f"{len(self.refused)} conversations are left out: {self.refused[0]}")
        return tuple(found)

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


def load_text(
    source: str | Path,
    tokenizer_folder: str | Path,
    samples: int,
    length: int,
    field: str | None = None,
    *,
    started: bool = True,
) -> Text:
    """The first `samples` sequences of `length` tokens. A short text gives fewer, and the last one is shorter.

    source: as in `act_scales.sources`; it is read no further than needed. tokenizer_folder: a Hugging Face model
    folder. field: where rows have their text, as in `act_scales.rows`. started: whether every sequence begins as the
    tokenizer begins a text. Raises UserError if the source cannot be read, if the folder has no usable tokenizer, or no
    chat template for conversations, or if the text has fewer than 32 tokens.
    """
    if samples < 1 or length < 1:
        raise UserError(f"{samples} samples of {length} tokens", expected="at least 1 of at least 1")
    encoder = Encoder(tokenizer_folder)
    start = encoder.start if started else []
    if length <= len(start):
        raise UserError(
            f"sequences of {length} tokens, which the tokenizer begins with {encoder.spelled(start)}",
            expected=f"at least {len(start) + 1}",
            do="choose a greater length",
        )
    sequences = pack(token_stream(documents(source, field), encoder), samples, length, start)
    text = Text(sequences, _name(source), tuple(encoder.refused), encoder.spelled(start))
    needed = min(MINIMUM, samples * length)
    if text.tokens < needed:
        raise UserError(
            "; ".join([f"{source}: {text.tokens} tokens of text", *text.refused[:1]]),
            expected=f"at least {needed} of the {samples} x {length} asked for",
            do="give a longer text",
        )
    return text


def load_document(
    source: str | Path, tokenizer_folder: str | Path, samples: int, length: int, field: str | None = None
) -> Text:
    """The sequences of a source that is tokenized as one document: its rows, joined by blank lines.

    Blank rows are joined too. WikiText's perplexities are measured in this way: the document begins as the tokenizer
    begins a text, and no other sequence does. Raises UserError if the source cannot
    be read, has no text, or has conversations, or if the folder has no usable tokenizer.
    """
    if samples < 1 or length < 2:
        raise UserError(f"{samples} samples of {length} tokens", expected="at least 1 of at least 2")
    encoder = Encoder(tokenizer_folder)
    whole = "\n\n".join(map(_prose, documents(source, field, blank=True)))
    text = Text(pack(encoder.whole([whole]), samples, length), source=_name(source))
    if not text.tokens:
        raise UserError(f"{source}: no text in it", do="give a longer text")
    return text


def token_stream(documents: Iterable[Document], encoder: Encoder) -> Iterator[Sequence[int]]:
    """Token ids of all documents, in order and in parts. Each document stands between its special tokens."""
    for document in documents:
        if isinstance(document, Conversation):
            yield encoder.chat(document)
        else:
            yield from encoder.whole(pieces(document))


def pack(stream: Iterable[Sequence[int]], samples: int, length: int, start: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """At most `samples` int64 sequences of `length` tokens. The stream is read no further than they need.

    start: what every sequence begins with, fewer than `length` tokens; not added where the stream has it already.
    """
    sequences = _cut(chain.from_iterable(stream), length, list(start))
    return tuple(torch.tensor(ids, dtype=torch.int64) for ids in islice(sequences, samples))


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


def _cut(ids: Iterator[int], length: int, start: list[int]) -> Iterator[list[int]]:
    rest: list[int] = []
    while taken := rest + list(islice(ids, length - len(rest))):
        begun = taken if taken[: len(start)] == start else start + taken
        yield begun[:length]
        rest = begun[length:]


def _name(source: str | Path) -> str:
    return str(source) if str(source).startswith("hf:") else Path(source).name


def _last(pattern: re.Pattern[str], text: str, limit: int) -> int:
    return max((match.end() for match in pattern.finditer(text, limit // 2, limit)), default=0)


def _prose(document: Document) -> str:
    """The text of a document that stands among others in one."""
    if isinstance(document, Conversation):
        raise UserError(
            f"{document.where}: a conversation",
            expected="plain text, which is measured as one document",
            do="give another text, or name the field that holds it: --text-field NAME",
        )
    return "".join(document)
