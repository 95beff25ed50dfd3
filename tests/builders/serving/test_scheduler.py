"""The scheduler: every answer is the one that a sequence gets alone, whoever comes and goes beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy
import pytest

from builders.engine.slots import ServableEngine, Slots
from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.onnxruntime.record import ATTENTION, GROUPED
from builders.serving.jobs import End, Event, Finished, Job, PromptScored, QueueFullError, Scored, StoppingError
from builders.serving.scheduler import Scheduler, Ticket
from smoothquant.errors import UserError

LENGTH = 48
DRAW = numpy.random.default_rng(0)
PROMPTS = [tuple(map(int, DRAW.integers(0, 250, size=size))) for size in (3, 20, 1, 9, 30, 5, 14, 2)]


@pytest.fixture(scope="module", params=ATTENTION)
def engine(request: pytest.FixtureRequest, exports: Mapping[str, Path], tmp_path_factory) -> OnnxRuntimeEngine:
    folder = tmp_path_factory.mktemp("served") / request.param
    build(exports["per-token"], folder, attention=request.param)
    return OnnxRuntimeEngine(folder)


@pytest.fixture
def scheduler(engine: OnnxRuntimeEngine) -> Iterator[Scheduler]:
    made = Scheduler(engine, batch=3, queue=64, length=LENGTH)
    made.start()
    yield made
    made.stop(grace=0)


class Client:
    """Collects the events of one job."""

    def __init__(self, scheduler: Scheduler, job: Job) -> None:
        self.events: list[Event] = []
        self._done = threading.Event()
        self.ticket: Ticket = scheduler.submit(job, self._deliver)

    def _deliver(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self._done.set()

    def wait(self) -> Finished:
        assert self._done.wait(60)
        assert [isinstance(event, Finished) for event in self.events] == [False] * (len(self.events) - 1) + [True]
        finished = self.events[-1]
        assert isinstance(finished, Finished)
        return finished

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, Scored)]


def jobs(count: int) -> list[Job]:
    return [Job(PROMPTS[n % len(PROMPTS)], 4 + n % 11, temperature=n % 3 * 0.7, seed=n) for n in range(count)]


def alone(engine: ServableEngine, job: Job) -> list[int]:
    return list(engine.generate(job.prompt, job.max_new_tokens, job.temperature, job.top_p, job.seed))


def test_every_answer_is_the_one_given_alone(engine: OnnxRuntimeEngine, scheduler: Scheduler) -> None:
    clients = [Client(scheduler, job) for job in jobs(40)]
    for client in clients:
        expected = alone(engine, client.ticket.job)
        assert client.wait().end is (End.LENGTH if len(expected) == client.ticket.job.max_new_tokens else End.STOP)
        assert client.tokens == expected


def test_swapped_caches_are_seen(engine: OnnxRuntimeEngine) -> None:
    """The control of the test above: two sequences whose caches are exchanged give other answers."""

    class Swapped(OnnxRuntimeEngine):
        def slots(self, count: int, length: int) -> Slots:
            made = super().slots(count, length)
            step, made.steps = made.step, 0  # type: ignore[attr-defined]

            def swapped(tokens: Mapping[int, int]) -> Mapping[int, numpy.ndarray]:
                made.steps += 1  # type: ignore[attr-defined]
                if made.steps == 3:  # type: ignore[attr-defined]
                    held = made._rows if hasattr(made, "_rows") else made._decodings  # type: ignore[attr-defined]
                    held[0], held[1] = held[1], held[0]
                return step(tokens)

            made.step = swapped  # type: ignore[method-assign]
            return made

    scheduler = Scheduler(Swapped(engine.folder), batch=2, queue=4, length=LENGTH)
    clients = [Client(scheduler, Job(PROMPTS[n], 12)) for n in (1, 4)]
    scheduler.start()
    for client in clients:
        client.wait()
    scheduler.stop()
    assert any(client.tokens != alone(engine, client.ticket.job) for client in clients)


def test_a_shared_beginning_is_computed_once(engine: OnnxRuntimeEngine, scheduler: Scheduler) -> None:
    shared = PROMPTS[4][:24]
    prompts = [(*shared, n, n + 1) for n in range(7)]
    clients = [Client(scheduler, Job(prompt, 6)) for prompt in prompts]
    cached = [client.wait().cached for client in clients]
    assert cached == [0, *[len(shared)] * 6]
    for client in clients:
        assert client.tokens == alone(engine, client.ticket.job)
    again = Client(scheduler, Job((*prompts[-1], *clients[-1].tokens, 7), 4))  # the next turn of a conversation
    assert again.wait().cached == len(prompts[-1])  # tokens that came one by one are read again
    assert again.tokens == alone(engine, again.ticket.job)


def test_no_token_of_a_prompt_is_read_by_itself(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In large models, one query is computed in another order of summation than several."""
    monkeypatch.setattr("builders.engine.generation.PIECE", 4)
    scheduler = Scheduler(engine, batch=3, queue=64, length=LENGTH)
    read: list[int] = []
    append = scheduler._slots.append

    def noted(slot: int, tokens: Sequence[int], keep: int = 1) -> numpy.ndarray:
        read.append(len(tokens))
        return append(slot, tokens, keep)

    monkeypatch.setattr(scheduler._slots, "append", noted)
    prompt = PROMPTS[4]
    clients = [Client(scheduler, Job(prompt[:size], 3)) for size in (30, 30, 2, 5, 29, 28, 27, 9)]
    scheduler.start()
    assert [client.wait().cached for client in clients] == [0, 28, 0, 0, 27, 26, 25, 0]
    assert set(read) <= {2, 3, 4}
    for client in clients:
        assert client.tokens == alone(engine, client.ticket.job)
    scheduler.stop()


def test_an_engine_may_copy_in_multiples(engine: OnnxRuntimeEngine) -> None:
    """OpenVINO's sums go by where pieces begin."""
    scheduler = Scheduler(engine, batch=3, queue=64, length=LENGTH)
    scheduler._slots.multiple = 12
    clients = [Client(scheduler, Job((*PROMPTS[4][:size], 1, 2, 3), 3)) for size in (27, 30, 24, 20)]
    scheduler.start()
    assert [client.wait().cached for client in clients] == [0, 24, 24, 0]  # nothing below `WORTH_COPYING`
    for client in clients:
        assert client.tokens == alone(engine, client.ticket.job)
    scheduler.stop()


def test_log_probabilities_are_those_of_whole_sequences(engine: OnnxRuntimeEngine, scheduler: Scheduler) -> None:
    client = Client(scheduler, Job(PROMPTS[1], 5, top=3, echo=True))
    client.wait()
    prompt, *new = client.events[:-1]
    assert isinstance(prompt, PromptScored)
    assert prompt.scores[0] == Scored(PROMPTS[1][0])
    slots = engine.slots(1, LENGTH)
    logits = slots.append(slots.open(), [*PROMPTS[1], *client.tokens[:-1]], keep=0).astype(numpy.float64)
    expected = logits - numpy.log(numpy.exp(logits).sum(axis=-1, keepdims=True))
    for scored, row in zip([*prompt.scores[1:], *new], expected, strict=True):
        assert isinstance(scored, Scored)
        assert scored.logprob == pytest.approx(row[scored.token], abs=1e-4)
        assert [token for token, _ in scored.top] == numpy.argsort(-row, kind="stable")[:3].tolist()
    nothing = Client(scheduler, Job(PROMPTS[1], 0, top=0, echo=True))
    assert nothing.wait().end is End.LENGTH
    assert len(nothing.events) == 2


def test_a_job_that_nobody_wants_leaves_within_a_step(engine: OnnxRuntimeEngine) -> None:
    scheduler = Scheduler(engine, batch=1, queue=4, length=LENGTH)
    first, second = (Client(scheduler, Job(PROMPTS[0], 40)) for _ in range(2))
    scheduler._turn()
    scheduler._turn()
    assert len(scheduler._writing) == 1
    first.ticket.cancel()
    scheduler._turn()
    assert first.wait().end is End.CANCELLED
    assert len(first.tokens) == 3
    assert scheduler._writing == [second.ticket]


def test_a_job_has_a_deadline(engine: OnnxRuntimeEngine) -> None:
    scheduler = Scheduler(engine, batch=1, queue=4, length=LENGTH)
    late = Client(scheduler, Job(PROMPTS[0], 40, timeout=0))
    time.sleep(0.01)
    scheduler.start()
    assert late.wait().end is End.TIMEOUT
    scheduler.stop()


def test_a_full_queue_says_when_to_come_again(engine: OnnxRuntimeEngine) -> None:
    scheduler = Scheduler(engine, batch=1, queue=2, length=LENGTH)
    clients = [Client(scheduler, Job(PROMPTS[0], 3)) for _ in range(2)]
    with pytest.raises(QueueFullError) as full:
        Client(scheduler, Job(PROMPTS[0], 3))
    assert full.value.seconds >= 1
    scheduler.start()
    scheduler.stop()  # finishes what there is
    assert [client.wait().end for client in clients] == [End.LENGTH] * 2
    with pytest.raises(StoppingError):
        Client(scheduler, Job(PROMPTS[0], 3))


def test_a_stop_without_patience_cancels(engine: OnnxRuntimeEngine) -> None:
    scheduler = Scheduler(engine, batch=1, queue=4, length=LENGTH)
    clients = [Client(scheduler, Job(PROMPTS[0], 44)) for _ in range(3)]
    scheduler.start()
    scheduler.stop(grace=0)
    assert clients[-1].wait().end is End.CANCELLED


@pytest.mark.parametrize("job", [Job((), 1), Job((1,), -1), Job((1,) * 40, 9), Job((1, 10**6), 1), Job((-1,), 1)])
def test_a_job_that_the_engine_cannot_hold_is_refused(job: Job, engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(UserError):
        Scheduler(engine, batch=1, queue=1, length=LENGTH).submit(job, lambda event: None)


def test_a_fault_ends_the_jobs_that_it_concerns(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(engine, batch=2, queue=4, length=LENGTH)
    faulty, other = (Client(scheduler, Job(prompt, 12)) for prompt in (PROMPTS[0], PROMPTS[1]))
    chosen = scheduler._choose

    def choose(ticket: Ticket, logits: numpy.ndarray) -> None:
        chosen(ticket, logits * numpy.nan if ticket is faulty.ticket and len(ticket.tokens) == 4 else logits)

    monkeypatch.setattr(scheduler, "_choose", choose)
    scheduler.start()
    assert faulty.wait().end is End.ERROR
    assert "NaN" in faulty.wait().message
    assert other.wait().end is End.LENGTH
    assert other.tokens == alone(engine, other.ticket.job)
    later = Client(scheduler, Job(PROMPTS[3], 4))
    assert later.wait().end is End.LENGTH
    scheduler.stop()


def test_both_forms_are_tried(engine: OnnxRuntimeEngine) -> None:
    assert engine.grouped == (engine.folder.name == GROUPED)
