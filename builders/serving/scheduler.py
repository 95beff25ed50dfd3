"""Continuous batching: jobs join and leave between steps of one engine.

One thread drives the engine. A turn of it admits jobs that wait, reads one piece of one prompt, and gives each sequence
under way its next token; so a long prompt delays the others by one piece at a time. Prompts are read one after another:
of jobs that come together with the same beginning, the first one computes it, and the others copy it. A sequence that
has ended stays in its slot, to be copied from, until another job needs the slot.

Only what was read of a prompt is copied, and two tokens at least are left to read: tokens that come one by one are
computed in another order of summation (`builders.engine.generation`), and an answer is to be that of `generate`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import numpy

from builders.engine.generation import end_tokens, pick, piece_at
from builders.engine.slots import ServableEngine
from builders.serving.jobs import (
    Deliver,
    End,
    Finished,
    Job,
    Observer,
    PromptScored,
    QueueFullError,
    Scored,
    StoppingError,
)

WORTH_COPYING = 16  # tokens at the beginning of a prompt
LAST = 2  # tokens of a prompt that are read in any case; they give the logits


class Ticket:
    """A job that was submitted."""

    def __init__(self, job: Job, deliver: Deliver, seed: int) -> None:
        self.job, self.deliver = job, deliver
        self.submitted = time.monotonic()
        self.cancelled = False
        self.slot = -1
        self.read = 0  # tokens of the prompt that are in the cache
        self.cached = 0  # of these, copied ones
        self.scores: list[Scored] = [Scored(job.prompt[0])]
        self.tokens: list[int] = []
        self.random = numpy.random.default_rng(seed)

    def cancel(self) -> None:
        """End the job before the next step. Safe in any thread, and after the end."""
        self.cancelled = True

    @property
    def copyable(self) -> Sequence[int]:
        """The tokens at the beginning of the cache that others may copy."""
        return self.job.prompt[: self.read]

    @property
    def overdue(self) -> bool:
        return time.monotonic() - self.submitted > self.job.timeout


class Scheduler:
    """Runs jobs on an engine in a thread of its own, from `start` to `stop`.

    batch: the largest number of sequences under way. queue: the largest number of jobs that wait. length: the largest
    number of tokens of a sequence.
    """

    def __init__(
        self, engine: ServableEngine, *, batch: int, queue: int, length: int, observer: Observer | None = None
    ) -> None:
        self.engine, self.batch, self.queue, self.length = engine, batch, queue, length
        self.observer = observer or Observer()
        self._slots = engine.slots(batch, length)
        self._ends = end_tokens(engine.folder)
        self._waiting: deque[Ticket] = deque()
        self._reading: deque[Ticket] = deque()
        self._writing: list[Ticket] = []
        self._left: dict[int, Sequence[int]] = {}  # slot of an ended sequence -> what others may copy; oldest first
        self._seeds = count(int(time.time()))
        self._seconds = 1.0  # of a job, lately
        self._news = threading.Condition()
        self._stopping = self._impatient = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def together(self) -> bool:
        """Whether a step of all sequences is one run of the engine."""
        return self._slots.together

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """Queue a job. Its events go to `deliver`; the last one is a `Finished`.

        Raises QueueFullError or StoppingError, and UserError for a job that the engine cannot hold.
        """
        self.engine.check_prompt(job.prompt, job.max_new_tokens, self.length)
        ticket = Ticket(job, deliver, job.seed if job.seed >= 0 else next(self._seeds))
        with self._news:
            if self._stopping:
                raise StoppingError
            if len(self._waiting) >= self.queue:
                raise QueueFullError(max(1.0, self._seconds * len(self._waiting) / self.batch))
            self._waiting.append(ticket)
            self._news.notify()
        return ticket

    def stop(self, grace: float = 30.0) -> None:
        """Take no more jobs, finish those there are, and cancel what is not finished after `grace` seconds."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join(grace)
        self._impatient = True  # the thread itself cancels: a job that is on its way from place to place counts, too
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._waiting or self._reading or self._writing):
                    if self._stopping:
                        return
                    self._news.wait()
            self._turn()

    def _turn(self) -> None:
        """Admit jobs, read one piece of a prompt, and take a step."""
        self._drop()
        self._admit()
        if self._reading:
            self._guarded([self._reading[0]], self._read_piece)
        if self._writing:
            self._guarded(list(self._writing), self._step)
        self.observer.depth(len(self._waiting), len(self._reading) + len(self._writing))

    def _guarded(self, tickets: list[Ticket], work: Callable[[], None]) -> None:
        """Do a piece of work for some jobs, which end where it fails; the others and the scheduler live on."""
        try:
            work()
        except Exception as error:  # an engine's own errors are of many kinds
            for ticket in tickets:
                self._end(ticket, End.ERROR, str(error))

    def _drop(self) -> None:
        """End the jobs that nobody wants any more."""
        with self._news:
            tickets = [*self._waiting, *self._reading, *self._writing]
        for ticket in tickets:
            if self._impatient or ticket.cancelled:
                self._end(ticket, End.CANCELLED)
            elif ticket.overdue:
                self._end(ticket, End.TIMEOUT)

    def _admit(self) -> None:
        """Let jobs that wait have a slot, as long as there are some."""
        while self._waiting and len(self._reading) + len(self._writing) < self.batch:
            with self._news:
                self._reading.append(self._waiting.popleft())

    def _read_piece(self) -> None:
        """Read the next piece of the first prompt that is under way."""
        ticket = self._reading[0]
        job = ticket.job
        if ticket.slot < 0:
            self._place(ticket)
        piece = piece_at(job.prompt, ticket.read)
        logits = self._slots.append(ticket.slot, piece, keep=0 if job.echo else 1)
        if job.echo:
            following = job.prompt[ticket.read + 1 : ticket.read + 1 + len(piece)]
            ticket.scores += [scored(row, token, job.top) for row, token in zip(logits, following, strict=False)]
        ticket.read += len(piece)
        if ticket.read < len(job.prompt):
            return
        self._reading.popleft()
        self._writing.append(ticket)
        self.observer.prompt(len(job.prompt), ticket.cached)
        if job.echo:
            ticket.deliver(PromptScored(tuple(ticket.scores)))
        self._choose(ticket, logits[-1])

    def _place(self, ticket: Ticket) -> None:
        """Give a job a slot, with what another sequence has of its prompt."""
        running = [other for other in (*self._writing, *self._reading) if other.slot >= 0]
        held = self._left | {other.slot: other.copyable for other in running}
        beginning = ticket.job.prompt[:-LAST]
        multiple = self._slots.multiple
        shared = {slot: _common(tokens, beginning) // multiple * multiple for slot, tokens in held.items()}
        source = max(shared, key=shared.__getitem__, default=-1)
        if not ticket.job.echo and shared.get(source, 0) >= WORTH_COPYING:
            ticket.read = ticket.cached = shared[source]
        if ticket.cached and source in self._left and self._slots.cut(source, ticket.cached):
            del self._left[source]  # it goes on from there, and is copied from as before
            ticket.slot = source
            return
        if len(self._left) + len(self._writing) + sum(other.slot >= 0 for other in self._reading) >= self.batch:
            oldest = next(iter(self._left))
            self._slots.close(oldest)
            del self._left[oldest], held[oldest]
        copied = self._slots.fork(source, ticket.cached) if ticket.cached and source in held else None
        if copied is None:
            ticket.read = ticket.cached = 0
        ticket.slot = self._slots.open() if copied is None else copied

    def _step(self) -> None:
        """Append the newest token of every sequence, and choose the next ones."""
        begin = time.perf_counter()
        tickets = list(self._writing)
        logits = self._slots.step({ticket.slot: ticket.tokens[-1] for ticket in tickets})
        self.observer.stepped(len(tickets), time.perf_counter() - begin)
        for ticket in tickets:
            self._guarded([ticket], partial(self._choose, ticket, logits[ticket.slot]))

    def _choose(self, ticket: Ticket, logits: numpy.ndarray) -> None:
        """Choose the next token of a sequence, and end the job where that was the last one."""
        job = ticket.job
        if not job.max_new_tokens:
            return self._end(ticket, End.LENGTH)
        token = pick(logits, job.temperature, job.top_p, ticket.random)
        if not ticket.tokens:
            self.observer.first_token(time.monotonic() - ticket.submitted)
        if token in self._ends and not job.endless:
            return self._end(ticket, End.STOP, last=scored(logits, token, job.top))
        ticket.tokens.append(token)
        ticket.deliver(scored(logits, token, job.top))
        if len(ticket.tokens) >= job.max_new_tokens:
            self._end(ticket, End.LENGTH)
        return None

    def _end(self, ticket: Ticket, end: End, message: str = "", last: Scored | None = None) -> None:
        with self._news:
            for place in (self._waiting, self._reading, self._writing):
                if ticket in place:
                    place.remove(ticket)
        if ticket.slot >= 0:
            if end is End.ERROR:
                self._slots.close(ticket.slot)
            else:
                self._left[ticket.slot] = ticket.copyable
        self._seconds += 0.1 * (time.monotonic() - ticket.submitted - self._seconds)
        self.observer.finished(end, len(ticket.tokens))
        ticket.deliver(Finished(end, ticket.cached, message, last))


def scored(logits: numpy.ndarray, token: int, top: int | None) -> Scored:
    """A token with its log-probability. logits: float32 (vocab,). top: as in `Job`."""
    if top is None:
        return Scored(token)
    wide = logits.astype(numpy.float64)
    logprobs = wide - wide.max()
    logprobs -= numpy.log(numpy.exp(logprobs).sum())
    best = numpy.argpartition(-logprobs, min(top, len(logprobs) - 1))[:top]
    best = best[numpy.argsort(-logprobs[best], kind="stable")]
    return Scored(token, float(logprobs[token]), tuple((int(one), float(logprobs[one])) for one in best))


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), min(len(held), len(prompt)))
