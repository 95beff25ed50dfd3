"""What a server counts, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from builders.serving.jobs import Observer

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5, 10, 20, 30, 60)


class Counters(Observer):
    """The counters of one server. Safe in several threads."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.waiting = self._gauge("jobs_waiting", "Jobs in the queue")
        self.running = self._gauge("jobs_running", "Jobs under way")
        self.batch = self._histogram("batch_size", "Sequences that a step gave a token to", BATCHES)
        self.steps = self._histogram("step_seconds", "Time of a step", SECONDS)
        self.first = self._histogram("time_to_first_token_seconds", "From a job's arrival to its first token", SECONDS)
        self.each = self._histogram("time_per_output_token_seconds", "Mean of a job behind its first token", SECONDS)
        self.prompts = self._counter("prompt_tokens", "Tokens of prompts")
        self.cached = self._counter("cached_prompt_tokens", "Tokens of prompts that were not computed again")
        self.generated = self._counter("generated_tokens", "New tokens")
        self.refused = self._counter("refusals", "Requests that were refused or failed", "status")
        self.ended = self._counter("finished", "Jobs that ended", "reason")

    def page(self) -> bytes:
        """All counters, as text."""
        return generate_latest(self.registry)

    def depth(self, waiting: int, running: int) -> None:
        self.waiting.set(waiting)
        self.running.set(running)

    def stepped(self, batch: int, seconds: float) -> None:
        self.batch.observe(batch)
        self.steps.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self.first.observe(seconds)

    def prompt(self, tokens: int, cached: int) -> None:
        self.prompts.inc(tokens)
        self.cached.inc(cached)

    def answered(self, reason: str, tokens: int, seconds_per_token: float | None) -> None:
        """A choice has ended. reason: OpenAI's, or why there is none. seconds_per_token: None for fewer than two."""
        self.generated.inc(tokens)
        self.ended.labels(reason).inc()
        if seconds_per_token is not None:
            self.each.observe(seconds_per_token)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"smoothquant_{name}", meaning, registry=self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"smoothquant_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"smoothquant_{name}", meaning, buckets=buckets, registry=self.registry)
