"""A request's jobs, from their submission to their last event.

The scheduler's thread puts events down; the event loop is woken once for all that lie there, and hands them to the
requests that wait for them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

from builders.serving.jobs import End, Event, Finished, Job, QueueFullError, StoppingError
from builders.serving.openai.choice import Choice, Piece
from builders.serving.openai.errors import ApiError, invalid
from builders.serving.openai.metrics import Counters
from builders.serving.scheduler import Scheduler, Ticket
from smoothquant.errors import UserError

Inbox = asyncio.Queue[tuple[int, Event] | None]  # number of a choice, and its event; None: the client has gone


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Mailroom:
    """Brings events from the scheduler's thread to the loop that is running now."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._lying: deque[tuple[Inbox, int, Event]] = deque()
        self._called = False  # whether the loop is about to look

    def deliver_to(self, inbox: Inbox, index: int) -> Callable[[Event], None]:
        """The function that takes a job's events, in any thread."""

        def deliver(event: Event) -> None:
            self._lying.append((inbox, index, event))
            if not self._called:
                self._called = True
                with suppress(RuntimeError):  # the loop has ended, and all who waited with it
                    self.loop.call_soon_threadsafe(self._hand_out)

        return deliver

    def _hand_out(self) -> None:
        self._called = False  # first: what lies down from now on calls again
        while self._lying:
            inbox, index, event = self._lying.popleft()
            inbox.put_nowait((index, event))


class Answering:
    """The jobs of one request. choices: what comes of each, in the same order.

    Raises ApiError if they cannot be queued, none of them then.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        mailroom: Mailroom,
        metrics: Counters,
        jobs: Sequence[Job],
        choices: Sequence[Choice],
    ) -> None:
        self.choices, self._metrics = choices, metrics
        self._inbox: Inbox = asyncio.Queue()
        self._tickets: list[Ticket] = []
        try:
            for index, job in enumerate(jobs):
                self._tickets.append(scheduler.submit(job, mailroom.deliver_to(self._inbox, index)))
        except (UserError, QueueFullError, StoppingError) as error:
            self.cancel()
            raise _refused(error) from error

    def cancel(self) -> None:
        """End the jobs that have not ended."""
        for ticket in self._tickets:
            ticket.cancel()

    async def pieces(self, receive: Callable[[], Awaitable[object]]) -> AsyncIterator[tuple[int, Piece]]:
        """Yield what comes: the number of a choice, and a piece of it.

        receive: ASGI's, after the body. Raises ClientGoneError, and ApiError for a job that has failed; then, and when
        nobody reads on, the jobs end.
        """
        watch = asyncio.ensure_future(self._watch(receive))
        left = len(self.choices)
        try:
            while left:
                found = await self._inbox.get()
                if found is None:
                    raise ClientGoneError
                index, event = found
                choice = self.choices[index]
                left -= isinstance(event, Finished)
                piece = self._counted(choice, event)
                if choice.stopped:
                    self._tickets[index].cancel()
                yield index, piece
        finally:
            watch.cancel()
            self.cancel()
            for choice in self.choices:
                if not choice.finished:
                    self._metrics.answered(End.CANCELLED.value, choice.tokens, choice.seconds_per_token)

    def more(self) -> bool:
        """Whether another event lies here already."""
        return not self._inbox.empty()

    def _counted(self, choice: Choice, event: Event) -> Piece:
        """What an event adds to a choice. The end of one is counted."""
        try:
            piece = choice.take(event)
        except ApiError as error:
            self._metrics.answered(error.code or "", choice.tokens, choice.seconds_per_token)
            raise
        if piece.reason:
            self._metrics.answered(piece.reason, choice.tokens, choice.seconds_per_token)
        return piece

    async def _watch(self, receive: Callable[[], Awaitable[object]]) -> None:
        """Wait until the client goes."""
        message = await receive()
        while not (isinstance(message, dict) and message["type"] == "http.disconnect"):
            message = await receive()
        self._inbox.put_nowait(None)


def _refused(error: UserError | QueueFullError | StoppingError) -> ApiError:
    """What a client is told whose job was not taken."""
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": f"{error.seconds:.0f}"}
        return ApiError(429, f"this server is busy: {error}", code="queue_full", headers=retry)
    if isinstance(error, StoppingError):
        return ApiError(503, "this server stops", code="stopping", headers={"Retry-After": "5"})
    return invalid(str(error), "prompt")
