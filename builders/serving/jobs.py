"""What a server asks of a scheduler, and what it gets: jobs, and events of jobs.

A job is one continuation of one prompt. Who wants several, or several prompts, submits several jobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


@dataclass(frozen=True)
class Job:
    """One prompt and how it is to be continued.

    prompt: token ids of the model's vocabulary, at least one. max_new_tokens: 0 or more. temperature, top_p, seed: as
    `builders.engine.generation.pick` takes them; a seed below 0 is one of the scheduler's own. top: the number of
    likeliest tokens to tell with the log-probability of each token; None for no log-probabilities. echo: whether the
    prompt's own tokens get them too. endless: whether a token that ends a sequence is one like any other, which load
    generators want. timeout: seconds from now on after which the job ends.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = -1
    top: int | None = None
    echo: bool = False
    endless: bool = False
    timeout: float = 600.0


class End(Enum):
    """Why a job has ended."""

    STOP = "stop"  # a token that ends a sequence
    LENGTH = "length"  # as many tokens as were asked for
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Scored:
    """A token. logprob: its log-probability by the model's own logits, before temperature and top_p; None where nobody
    asked, and for the first token of a prompt. top: the likeliest tokens and their log-probabilities, likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptScored:
    """The prompt of a job with echo has been read. scores: one of each of its tokens."""

    scores: tuple[Scored, ...]


@dataclass(frozen=True)
class Finished:
    """The last event of a job. cached: the number of its prompt's tokens that were not computed again. message: what
    went wrong, for `End.ERROR`. last: the token that ended the sequence, for `End.STOP`."""

    end: End
    cached: int = 0
    message: str = ""
    last: Scored | None = None


Event: TypeAlias = PromptScored | Scored | Finished
Deliver: TypeAlias = Callable[[Event], None]  # called in the scheduler's thread


class QueueFullError(Exception):
    """As many jobs wait as may. seconds: when to come again, estimated."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full; try again in {seconds:.0f} s")
        self.seconds = seconds


class StoppingError(Exception):
    """The scheduler takes no more jobs, since it ends."""


class Observer:
    """Hears what a scheduler does, in its thread. A server overrides what it counts."""

    def depth(self, waiting: int, running: int) -> None:
        """The numbers of jobs now, told in every turn."""

    def stepped(self, batch: int, seconds: float) -> None:
        """A step gave a token to so many sequences."""

    def first_token(self, seconds: float) -> None:
        """A job has its first token, so many seconds after it was submitted."""

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt has been read."""

    def finished(self, end: End, tokens: int) -> None:
        """A job has ended with so many new tokens."""
