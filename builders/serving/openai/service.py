"""An engine with its scheduler and its tokenizer: requests -> jobs, and what the engine is, for /v1/models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from act_scales.kept_tokenizer import check_has_encoder, engine_encoder
from act_scales.tokenizer import TextEncoder
from builders.engine.slots import ServableEngine
from builders.engine.table import engine_manifest, open_engine
from builders.serving.jobs import Job
from builders.serving.openai.answers import Spelling
from builders.serving.openai.chat_template import ChatTemplate, ChatTemplateError, read_chat_template
from builders.serving.openai.choice import Choice
from builders.serving.openai.errors import invalid
from builders.serving.openai.metrics import Counters
from builders.serving.openai.requests import Asked, ChatRequest, CompletionRequest, Prompt
from builders.serving.scheduler import Scheduler
from smoothquant.artifacts.card import CARD, read_measured
from smoothquant.errors import UserError
from smoothquant.machine import free_memory
from smoothquant.outputs import MANIFEST, check_content, is_output, load_manifest
from smoothquant.reading import read_text

SHARE = 0.9  # of the memory that is left, for keys and values
LEAST_CONTEXT = 512  # tokens; fewer are not worth a server
USUAL_TOKENS = 16  # of a completion whose max_tokens is not given


@dataclass(frozen=True)
class ServingLimits:
    """batch: the largest number of sequences under way. queue: of jobs that wait. context: of tokens of a sequence;
    None for as many as the engine takes. timeout: seconds that a request may take."""

    batch: int = 16
    queue: int = 256
    context: int | None = None
    timeout: float = 600.0

    def check(self) -> None:
        """Raise UserError for limits that nothing can keep."""
        for name, value in (("--max-batch", self.batch), ("--max-queue", self.queue), ("--max-context", self.context)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}", expected="1 or more")
        if not 0 < self.timeout <= 1e9:
            raise UserError(f"--timeout {self.timeout}", expected="a number of seconds above 0")


@dataclass(frozen=True)
class Work:
    """What a request asks of the scheduler. jobs, choices: n of each prompt, prompt after prompt. prompts: the number
    of tokens of each prompt."""

    jobs: Sequence[Job]
    choices: Sequence[Choice]
    prompts: Sequence[int]


class Service:
    """What a server serves. name: the model's. length: the largest number of tokens of a sequence. metrics: what is
    counted."""

    def __init__(
        self,
        engine: ServableEngine,
        encoder: TextEncoder,
        template: ChatTemplate | None,
        name: str,
        limits: ServingLimits,
    ) -> None:
        self.name, self.limits, self.metrics = name, limits, Counters()
        self.length = _length(engine, limits)
        self.scheduler = Scheduler(
            engine, batch=limits.batch, queue=limits.queue, length=self.length, observer=self.metrics
        )
        self.encoder, self.spelling, self.template = encoder, Spelling(encoder), template
        self.model = _described(engine, name, self.length)

    def completion(self, asked: CompletionRequest) -> Work:
        """The jobs of a completion. Raises ApiError for prompts that cannot be continued."""
        tokens = USUAL_TOKENS if asked.max_tokens is None else asked.max_tokens
        scored = asked.logprobs is not None
        job = self._job(asked, tokens, top=asked.logprobs, echo=bool(asked.echo and scored))
        prompts = [self._ids(prompt) for prompt in asked.prompt]
        echoed = [self._text(prompt) if asked.echo else "" for prompt in asked.prompt]
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise invalid("prompt: the text has no tokens", f"prompt[{index}]")
        return self._work(asked, job, prompts, echoed)

    def chat(self, asked: ChatRequest) -> Work:
        """The job of a chat. Raises ApiError for a conversation that the template refuses."""
        if self.template is None:
            raise invalid(f"{self.name} has no chat template: it continues texts, /v1/completions", "messages")
        try:
            text = self.template.render([message.turn for message in asked.messages])
        except ChatTemplateError as error:
            raise invalid(f"the chat template refuses the conversation: {error}", "messages") from error
        prompt = tuple(self.encoder.plain(text))
        if not prompt:
            raise invalid("the chat template makes no text of the conversation", "messages")
        given = asked.max_completion_tokens or asked.max_tokens
        tokens = max(1, self.length - len(prompt)) if given is None else given
        job = self._job(asked, tokens, top=(asked.top_logprobs or 0) if asked.logprobs else None, echo=False)
        return self._work(asked, job, [prompt], [""])

    def _job(self, asked: Asked, tokens: int, top: int | None, echo: bool) -> Job:
        """A job without its prompt."""
        return Job(
            prompt=(),
            max_new_tokens=tokens,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top=top,
            echo=echo,
            endless=bool(asked.ignore_eos),
            timeout=self.limits.timeout,
        )

    def _work(self, asked: Asked, job: Job, prompts: Sequence[tuple[int, ...]], echoed: Sequence[str]) -> Work:
        each = asked.n or 1
        most = self.limits.queue
        if len(prompts) * each > most:
            raise invalid(f"n: {len(prompts)} prompts, {each} times each; expected at most {most} answers", "n")
        for prompt in prompts:
            if len(prompt) + job.max_new_tokens > self.length:
                raise invalid(
                    f"a prompt of {len(prompt)} tokens with {job.max_new_tokens} new ones; expected at most "
                    f"{self.length} tokens together",
                    "messages" if isinstance(asked, ChatRequest) else "prompt",
                    "context_length_exceeded",
                )
        jobs = [
            replace(job, prompt=prompt, seed=-1 if asked.seed is None else (asked.seed + number) % 2**64)
            for prompt in prompts
            for number in range(each)
        ]
        choices = [
            Choice(self.encoder, asked.stop, () if isinstance(asked, ChatRequest) else prompt, text)  # a turn is a text
            for prompt, text in zip(prompts, echoed, strict=True)
            for _ in range(each)
        ]
        return Work(jobs, choices, [len(prompt) for prompt in prompts])

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt. A text begins as the tokenizer begins a text, as in `generate`.

        Raises ApiError for token ids that are none.
        """
        if isinstance(prompt, str):
            return tuple(token for piece in self.encoder.whole([prompt]) for token in piece)
        vocabulary = self.scheduler.engine.manifest.facts.vocab_size
        if not all(0 <= token < vocabulary for token in prompt):
            raise invalid(f"prompt: expected token ids from 0 to {vocabulary - 1}", "prompt")
        return tuple(prompt)

    def _text(self, prompt: Prompt) -> str:
        """What is echoed of a prompt."""
        return prompt if isinstance(prompt, str) else self.encoder.decode(prompt)


def open_service(folder: str | Path, name: str | None, limits: ServingLimits, *, fast: bool) -> Service:
    """The service of an engine's folder. name: of the model; None for that of the folder. fast: whether files that have
    not changed since they were read are believed; else all are read, and compared with the manifest.

    Raises UserError for an engine that cannot be served, or was changed.
    """
    limits.check()
    folder = Path(folder)
    manifest = engine_manifest(folder) if is_output(folder) else load_manifest(folder)  # which says what it is not
    check_has_encoder(folder, manifest)
    if not fast:
        check_content(folder, manifest)
    template = read_chat_template(folder)
    engine = open_engine(folder)
    if not isinstance(engine, ServableEngine):
        raise UserError(
            f"{folder}: made by {manifest.step!r}, whose engines do not run sequences side by side",
            expected="a folder made by smoothquant build onnxruntime or build openvino",
            do="build one, or see builders/serving/README.md for the servers of this one",
        )
    if limits.context is not None and limits.context > engine.longest:
        raise UserError(
            f"--max-context {limits.context}", expected=f"at most {engine.longest}, for which the engine was built"
        )
    encoder = engine_encoder(engine.folder, engine.manifest)
    return Service(engine, encoder, template, name or Path(os.path.abspath(folder)).name, limits)


def _length(engine: ServableEngine, limits: ServingLimits) -> int:
    """The largest number of tokens of a sequence: what was asked for, or as many as the engine takes and memory holds.

    Raises UserError if the caches of such sequences do not fit into the memory that is left.
    """
    wanted, free = limits.context or engine.longest, free_memory()
    needed = engine.cache_bytes(limits.batch, wanted)
    if free is None or needed <= SHARE * free:
        return wanted
    fitting = int(SHARE * free / engine.cache_bytes(limits.batch, 1))
    if limits.context is None and fitting >= LEAST_CONTEXT:
        return fitting
    raise UserError(
        f"{limits.batch} sequences of {wanted} tokens: their keys and values take up to {needed / 1e9:.1f} GB",
        expected=f"at most {SHARE * free / 1e9:.1f} GB, {SHARE:.0%} of the memory that is left: {fitting} tokens",
        do="give a smaller --max-batch or --max-context, or export the model again with --kv int8",
    )


def _described(engine: ServableEngine, name: str, length: int) -> Mapping[str, Any]:
    """The engine in OpenAI's form of a model, and with what is known of it. validation: what the card tells of the
    last one, null for none."""
    card = engine.folder / CARD
    return {
        "id": name,
        "object": "model",
        "created": int((engine.folder / MANIFEST).stat().st_mtime),
        "owned_by": "smoothquant",
        "max_model_len": length,
        "scheme": engine.manifest.origin.scheme.words(),
        "validation": read_measured(read_text(card)) if card.exists() else None,
    }
