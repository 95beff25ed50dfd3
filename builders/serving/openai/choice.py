"""A job's events -> pieces of its answer: text in whole characters, up to a stop string, with the tokens it came from.

Text that could be the beginning of a stop string is held back until it cannot. The pieces are the same whether somebody
streams them or reads them together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from act_scales.tokenizer import TextEncoder, TextStream
from builders.serving.jobs import End, Finished, PromptScored, Scored
from builders.serving.openai.errors import ApiError


@dataclass(frozen=True)
class Placed:
    """A token of an answer. offset: where its text begins in that of the choice."""

    scored: Scored
    offset: int


@dataclass(frozen=True)
class Piece:
    """A part of a choice. tokens: those whose text begins in it, or before it without an end. reason: OpenAI's
    finish_reason in the last piece; empty before. end: the token that ended the sequence, if one did."""

    text: str
    tokens: tuple[Placed, ...] = ()
    reason: str = ""
    end: tuple[Placed, ...] = ()


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces. found: whether one came."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certain to lie before every stop string."""
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            kept = min(places)
        else:
            kept = len(self._held) - max((self._begun(string) for string in self._strings), default=0)
        certain, self._held = self._held[:kept], self._held[kept:]
        return certain

    def end(self) -> str:
        """What was held back, once nothing comes any more."""
        return "" if self.found else self._held

    def _begun(self, string: str) -> int:
        """The number of characters at the end of the text that begin a string."""
        longest = min(len(string) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(string[:size])), 0)


class Choice:
    """One of the answers to a request, as its job's events come.

    after: the tokens that the text continues, as a `TextStream` takes them. echoed: the text that comes first, the
    prompt; empty without echo. tokens: the number of new ones. cached: of the prompt's tokens, those that were not
    computed again. finished: whether all has come.
    """

    def __init__(self, encoder: TextEncoder, stops: Sequence[str], after: Sequence[int] = (), echoed: str = "") -> None:
        self._encoder, self.echoed = encoder, echoed
        self._stream = TextStream(encoder.decode, after)
        self._stops = StopStrings(stops)
        self._waiting: deque[Placed] = deque()  # tokens whose text is not certain yet
        self._length = self._certain = len(echoed)  # characters that were decoded, and that were given out
        self.tokens = self.cached = 0
        self.first = self.last = 0.0  # when new tokens came
        self.finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: the job may end."""
        return self._stops.found

    @property
    def seconds_per_token(self) -> float | None:
        """The mean time between new tokens; None for fewer than two."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    def take(self, event: Scored | PromptScored | Finished) -> Piece:
        """What an event adds to the answer. Raises ApiError for a job that has failed."""
        if isinstance(event, PromptScored):
            return Piece("", self._prompt(event.scores))
        if isinstance(event, Finished):
            return self._end(event)
        if self.stopped:  # a token behind the stop string, chosen before the job heard of it
            return Piece("")
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.tokens += 1
        self._waiting.append(Placed(event, self._length))
        text = self._stream.push(event.token)
        self._length += len(text)
        return self._piece(self._stops.push(text) if text else "")

    def _prompt(self, scores: Sequence[Scored]) -> tuple[Placed, ...]:
        """The tokens of the prompt, where they lie in it."""
        stream, placed, length = TextStream(self._encoder.decode), [], 0
        for scored in scores:
            placed.append(Placed(scored, min(length, len(self.echoed))))
            length += len(stream.push(scored.token))
        return tuple(placed)

    def _end(self, event: Finished) -> Piece:
        self.finished, self.cached = True, event.cached
        if self.stopped:
            return Piece("", reason="stop")
        if event.end is End.TIMEOUT:
            raise ApiError(504, "the answer took longer than this server lets a request take", code="timeout")
        if event.end is End.CANCELLED:
            raise ApiError(503, "this server stops", code="stopping")
        if event.end is End.ERROR:
            raise ApiError(500, f"the engine failed: {event.message}", code="engine_failed")
        rest = self._stops.push(self._stream.end())
        found = self._piece(rest + self._stops.end())
        if not self.stopped:  # all is certain, tokens without a text too
            found = Piece(found.text, (*found.tokens, *self._waiting))
        if self.stopped:
            return Piece(found.text, found.tokens, "stop")
        end = () if event.last is None else (Placed(event.last, self._certain),)
        return Piece(found.text, found.tokens, event.end.value, end)

    def _piece(self, text: str) -> Piece:
        """Give out a text that is certain, and the tokens that begin before its end."""
        self._certain += len(text)
        tokens = []
        while self._waiting and self._waiting[0].offset < self._certain:
            tokens.append(self._waiting.popleft())
        return Piece(text, tuple(tokens))
