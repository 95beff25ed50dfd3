"""Pieces of answers -> OpenAI's JSON, of completions and of chats, whole and in chunks.

Chunks are plain dicts: they are made for every token.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from act_scales.tokenizer import TextEncoder
from builders.serving.openai.choice import Choice, Piece, Placed

BYTE_LEVEL = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet writes as themselves
OTHERS = [byte for byte in range(256) if byte not in BYTE_LEVEL]
ALPHABET = {chr(byte): byte for byte in BYTE_LEVEL} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}

LEAST = -9999.0  # of log-probabilities


class Spelling:
    """What tokens are called in lists of log-probabilities: by their text, with its spaces; a special token by its
    name, half of a character by its bytes ("bytes:\\\\xe2\\\\x80")."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._anchor = encoder.plain("a")[-1:]  # behind it, no decoder drops a space
        self._before = len(encoder.decode(self._anchor))
        self._known: dict[int, tuple[str, bytes]] = {}

    def __call__(self, token: int) -> tuple[str, bytes]:
        """The name of a token, and its bytes."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._spelled(token)
        return found

    def _spelled(self, token: int) -> tuple[str, bytes]:
        text = self._encoder.decode([*self._anchor, token])[self._before :]
        name = self._encoder.spell(token) or f"<{token}>"
        if not text:
            return name, name.encode()
        if "\ufffd" not in text:
            return text, text.encode()
        if name.startswith("<0x"):
            found = bytes([int(name[3:-1], 16)])
        elif all(character in ALPHABET for character in name):
            found = bytes(ALPHABET[character] for character in name)
        else:  # the character itself is in the vocabulary
            return text, text.encode()
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found


class AnswerForm(ABC):
    """The form of one answer. model: its name to the client. scored: whether log-probabilities were asked for."""

    kind: str  # of a whole answer
    chunk_kind: str
    prefix: str  # of its id

    def __init__(self, model: str, spelling: Spelling, scored: bool) -> None:
        self._spelling, self._scored = spelling, scored
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Sequence[Piece]], usage: Mapping) -> dict[str, Any]:
        """The answer. pieces: of each choice."""
        made = []
        for index, (choice, parts) in enumerate(zip(choices, pieces, strict=True)):
            text = choice.echoed + "".join(part.text for part in parts)
            tokens = [token for part in parts for token in self._tokens(part)]
            made.append({"index": index, **self._content(text, tokens), "finish_reason": parts[-1].reason})
        return {**self._head, "object": self.kind, "choices": made, "usage": usage}

    def chunk(self, choice: Mapping[str, Any] | None, usage: Mapping | None = None) -> dict[str, Any]:
        """A part of a streamed answer. choice: None in that which tells the usage."""
        return {
            **self._head,
            "object": self.chunk_kind,
            "choices": [] if choice is None else [choice],
            **({} if usage is None else {"usage": usage or None}),
        }

    @abstractmethod
    def begin(self, index: int, choice: Choice) -> dict[str, Any] | None:
        """The first part of a choice, before any token; None if there is none."""

    @abstractmethod
    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A part of a choice."""

    def _tokens(self, piece: Piece) -> tuple[Placed, ...]:
        """The tokens of a piece that are told with log-probabilities."""
        return piece.tokens

    @abstractmethod
    def _content(self, text: str, tokens: Sequence[Placed]) -> dict[str, Any]:
        """A text and its tokens, as a whole choice has them."""


class CompletionForm(AnswerForm):
    """The form of /v1/completions. Offsets are those in the text of the choice."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def begin(self, index: int, choice: Choice) -> dict[str, Any] | None:
        return {"index": index, **self._content(choice.echoed, ()), "finish_reason": None} if choice.echoed else None

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"index": index, **self._content(piece.text, self._tokens(piece)), "finish_reason": piece.reason or None}

    def _tokens(self, piece: Piece) -> tuple[Placed, ...]:
        """The token that ended the text, too: clients that score texts count on it as on any other."""
        return (*piece.tokens, *piece.end)

    def _content(self, text: str, tokens: Sequence[Placed]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(tokens) if self._scored else None}

    def _logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        return {
            "tokens": [self._spelling(token.scored.token)[0] for token in tokens],
            "token_logprobs": [told(token.scored.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Placed) -> dict[str, float | None] | None:
        """The likeliest tokens, and the one that stands there, by name; None for the first token of a prompt."""
        if token.scored.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for other, logprob in (*token.scored.top, (token.scored.token, token.scored.logprob)):
            found.setdefault(self._spelling(other)[0], told(logprob))
        return found


class ChatForm(AnswerForm):
    """The form of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def begin(self, index: int, choice: Choice) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        logprobs = self._logprobs(piece.tokens) if self._scored and piece.tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.reason or None}

    def _content(self, text: str, tokens: Sequence[Placed]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(tokens) if self._scored else None}

    def _logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        content = []
        for token in tokens:
            top = [self._named(other, logprob) for other, logprob in token.scored.top]
            content.append({**self._named(token.scored.token, token.scored.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        name, content = self._spelling(token)
        return {"token": name, "logprob": told(logprob), "bytes": list(content)}


def told(logprob: float | None) -> float | None:
    """A log-probability as OpenAI tells it: at least `LEAST`, since JSON has no infinity."""
    return logprob if logprob is None or logprob > LEAST else LEAST


def usage_of(prompts: Sequence[int], choices: Sequence[Choice]) -> dict[str, Any]:
    """The numbers of tokens. prompts: of each prompt, which counts once for all its choices."""
    each = len(choices) // len(prompts)
    read, written = sum(prompts), sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in choices[::each])},
    }
