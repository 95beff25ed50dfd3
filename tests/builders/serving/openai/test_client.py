"""OpenAI's own client: what it asks for is what `generate` and the engine's logits say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI

from act_scales.tokenizer import Encoder
from builders.onnxruntime import OnnxRuntimeEngine
from tests.builders.serving.openai.served import Process, served

PROMPT = "def main(): é"
TURNS: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say it."}]
GREEDY: dict[str, Any] = {"model": "engine", "temperature": 0}


@pytest.fixture(scope="module")
def server(engine: Path) -> Iterator[Process]:
    with served(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Process) -> OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def encoder(engine: Path) -> Encoder:
    return Encoder(engine)


def ids_of(encoder: Encoder, text: str) -> list[int]:
    return list(chain(*encoder.whole([text])))


def generated(engine: Path, encoder: Encoder, prompt: list[int], tokens: int) -> str:
    return "".join(encoder.streamed(OnnxRuntimeEngine(engine).generate(prompt, tokens), prompt))


def logprobs_of(engine: Path, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary), from one run over a whole sequence."""
    return OnnxRuntimeEngine(engine).logits(torch.tensor([ids]))[0].double().log_softmax(-1)


def test_a_completion_is_that_of_generate(client: OpenAI, engine: Path, encoder: Encoder) -> None:
    ids = ids_of(encoder, PROMPT)
    expected = generated(engine, encoder, ids, 48)
    assert len(expected) > 20
    for prompt in (PROMPT, ids):
        found = client.completions.create(prompt=prompt, max_tokens=48, **GREEDY)
        assert found.choices[0].text == expected
        assert found.choices[0].finish_reason == "length"
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 48)
    assert client.completions.create(prompt=PROMPT, **GREEDY).usage.completion_tokens == 16  # type: ignore[union-attr]


def test_a_prompt_that_is_known_is_not_read_again(client: OpenAI, encoder: Encoder) -> None:
    prompt = "def f(x): return x * 3 + 97  # a prompt that nobody else asks for"
    first, again = (client.completions.create(prompt=prompt, max_tokens=8, **GREEDY) for _ in range(2))
    assert [first.choices[0].text] == [again.choices[0].text]
    for found, cached in ((first, 0), (again, len(ids_of(encoder, prompt)) - 2)):
        assert found.usage is not None
        assert found.usage.prompt_tokens_details is not None
        assert found.usage.prompt_tokens_details.cached_tokens == cached


def test_several_prompts(client: OpenAI, engine: Path, encoder: Encoder) -> None:
    texts = ["a", "return x * ", PROMPT]
    expected = [generated(engine, encoder, ids_of(encoder, text), 12) for text in texts]
    for prompts in (texts, [ids_of(encoder, text) for text in texts]):
        found = client.completions.create(prompt=prompts, max_tokens=12, n=2, **GREEDY)
        assert [choice.text for choice in found.choices] == [text for text in expected for _ in range(2)]
        assert [choice.index for choice in found.choices] == list(range(6))


def test_a_chat_is_that_of_its_template(client: OpenAI, engine: Path, encoder: Encoder) -> None:
    prompt = encoder.tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    expected = generated(engine, encoder, prompt, 24)
    for limit in ("max_tokens", "max_completion_tokens"):
        found = client.chat.completions.create(messages=TURNS, **{limit: 24}, **GREEDY)
        assert (found.choices[0].message.content, found.choices[0].message.role) == (expected, "assistant")
        assert found.usage is not None
        assert found.usage.prompt_tokens == len(prompt)
    parts = [{**TURNS[0], "role": "developer"}, {"role": "user", "content": [{"type": "text", "text": "Say it."}]}]
    again = client.chat.completions.create(messages=parts, max_tokens=24, **GREEDY)  # type: ignore[arg-type]
    assert again.choices[0].message.content == expected
    whole = client.chat.completions.create(messages=TURNS, **GREEDY)  # as long as the context lets it be
    assert whole.usage is not None
    assert whole.usage.total_tokens == 512 or whole.choices[0].finish_reason == "stop"


def test_logprobs_of_a_prompt_and_its_answer(client: OpenAI, engine: Path, encoder: Encoder) -> None:
    found = client.completions.create(prompt=PROMPT, max_tokens=8, echo=True, logprobs=3, **GREEDY).choices[0]
    ids = ids_of(encoder, PROMPT)
    ids += OnnxRuntimeEngine(engine).generate(ids, 8)
    expected = logprobs_of(engine, ids)
    assert found.logprobs is not None
    assert found.text == PROMPT + "".join(encoder.streamed(ids[-8:]))
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.top_logprobs[0] is None
    assert len(found.logprobs.tokens) == len(ids)
    for place, token in enumerate(ids[1:]):
        row, top = expected[place], found.logprobs.top_logprobs[place + 1]
        assert math.isclose(found.logprobs.token_logprobs[place + 1], row[token], abs_tol=1e-4)
        assert 3 <= len(top) <= 4  # with the token itself
        assert torch.allclose(torch.tensor(sorted(top.values())[-3:]), row.topk(3).values.flip(0).float(), atol=1e-4)
    offsets = found.logprobs.text_offset
    assert offsets[: len(PROMPT)] == list(range(len(PROMPT)))
    assert offsets == sorted(offsets)
    assert found.logprobs.tokens[:3] == ["d", "e", "f"]
    assert found.logprobs.tokens[len(PROMPT) - 1] == "bytes:\\xc3"  # half of é
    scored = client.completions.create(prompt=PROMPT, max_tokens=0, echo=True, logprobs=0, **GREEDY).choices[0]
    assert (scored.text, scored.finish_reason) == (PROMPT, "length")
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs == found.logprobs.token_logprobs[: len(PROMPT) + 1]


def test_the_token_that_ends_a_text_has_a_logprob(client: OpenAI, engine: Path, encoder: Encoder) -> None:
    """So a client that scores a text with max_tokens 1 may drop the last token (lm-evaluation-harness does)."""
    ended = [choice for choice in sampled(client) if choice.finish_reason == "stop"]
    assert ended
    for choice in ended:
        assert choice.logprobs.tokens[-1] == "</s>"
        assert choice.logprobs.token_logprobs[-1] < 0
        assert choice.logprobs.text_offset[-1] == len(choice.text)
    forced = sampled(client, extra_body={"ignore_eos": True})
    assert {choice.finish_reason for choice in forced} == {"length"}
    assert {len(choice.logprobs.tokens) for choice in forced} == {60}


def sampled(client: OpenAI, **options: Any) -> list[Any]:
    """Forty answers, of which some end by themselves."""
    found = client.completions.create(
        model="engine", prompt=PROMPT, n=40, seed=1, temperature=2, max_tokens=60, logprobs=0, **options
    )
    return list(found.choices)


def test_logprobs_of_a_chat(client: OpenAI, engine: Path, encoder: Encoder) -> None:
    asked: dict[str, Any] = {"messages": TURNS, "max_tokens": 6, "logprobs": True, "top_logprobs": 20, **GREEDY}
    found = client.chat.completions.create(**asked).choices[0]
    prompt = encoder.tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    tokens = list(OnnxRuntimeEngine(engine).generate(prompt, 6))
    expected = logprobs_of(engine, prompt + tokens)[len(prompt) - 1 :]
    assert found.logprobs is not None
    assert found.logprobs.content is not None
    assert len(found.logprobs.content) == 6
    for row, token, told in zip(expected, tokens, found.logprobs.content, strict=False):
        assert math.isclose(told.logprob, row[token], abs_tol=1e-4)
        assert told.top_logprobs[0].token == told.token
        assert len(told.top_logprobs) == 20
    written = bytes(byte for told in found.logprobs.content for byte in told.bytes or ())
    assert written.decode(errors="replace") == (found.message.content or "") or any(token > 255 for token in tokens)


STREAMED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 5, "n": 3},
    "stop": {"temperature": 0, "stop": ["\ufffd\ufffd\ufffd", "x"]},
    "logprobs": {"seed": 6, "temperature": 1.5, "top_p": 0.9, "logprobs": 2},
    "all": {"seed": -7, "n": 2, "stop": ["a", "e", "i", "~~~~"], "logprobs": 1, "echo": True},
}


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_is_the_whole_in_pieces(name: str, client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "engine", "prompt": [PROMPT, "né"], "max_tokens": 40, **STREAMED[name]}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert not any(chunk.usage for chunk in chunks[:-1])
    longest = 0
    for choice in whole.choices:
        parts = [part for chunk in chunks[:-1] for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        longest = max(longest, len(parts))
        if choice.logprobs:
            for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                told = [one for part in parts if part.logprobs for one in getattr(part.logprobs, field)]
                assert told == getattr(choice.logprobs, field)
    assert longest > 2


@pytest.mark.parametrize("name", ["greedy", "sampled", "stop"])
def test_a_chat_in_pieces(name: str, client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "engine", "messages": TURNS, "max_tokens": 40, **STREAMED[name]}
    options |= {"logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, **options))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[-1].finish_reason == choice.finish_reason
        told = [one for part in parts if part.logprobs for one in part.logprobs.content or ()]
        assert choice.logprobs is not None
        assert told == choice.logprobs.content


def test_a_stop_string_ends_the_text(client: OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 48, **GREEDY}
    text = client.completions.create(**asked).choices[0].text
    stop = text[20:24]
    found = client.completions.create(stop=stop, logprobs=0, **asked)
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens < 48
    told = found.choices[0].logprobs
    assert told is not None
    assert all(offset < len(found.choices[0].text) for offset in told.text_offset or ())
    unheard = client.completions.create(stop=[stop + "\0", "\0"], **asked).choices[0]
    assert (unheard.text, unheard.finish_reason) == (text, "length")


def test_a_seed_tells_the_answer(client: OpenAI, engine: Path, encoder: Encoder) -> None:
    asked: dict[str, Any] = {"model": "engine", "prompt": PROMPT, "max_tokens": 24, "seed": 3, "top_p": 0.95}
    three = [choice.text for choice in client.completions.create(n=3, **asked).choices]
    assert len(set(three)) == 3
    assert client.completions.create(**asked).choices[0].text == three[0]
    tokens = OnnxRuntimeEngine(engine).generate(ids_of(encoder, PROMPT), 24, temperature=1.0, top_p=0.95, seed=3)
    assert "".join(encoder.streamed(tokens)) == three[0]
    assert client.completions.create(**{**asked, "seed": None}).choices[0].text not in three


def test_the_model_says_what_it_is(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert model == client.models.retrieve("engine")
    told = model.model_dump()
    assert (told["id"], told["max_model_len"], told["validation"]) == ("engine", 512, None)
    assert told["scheme"]["activations"] == "per-token"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "logit_bias": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "unknown": ({"extra_body": {"min_p": 0.1}}, "min_p"),
    "n": ({"n": 0}, "n"),
    "too many": ({"n": 129}, "n"),
    "temperature": ({"temperature": 2.5}, "temperature"),
    "max_tokens": ({"max_tokens": -1}, "max_tokens"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "stop": ({"stop": ["a"] * 5}, "stop"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    "tool_calls": ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    "template": ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    "long": ({"max_tokens": 10_000}, "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(name: str, client: OpenAI) -> None:
    changed, param = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": "engine", "messages": TURNS, "max_tokens": 4} | changed))
    assert str(caught.value.param).startswith(param), caught.value
    assert caught.value.type == "invalid_request_error"
    if name == "template":
        assert "a user speaks first" in str(caught.value)


def test_neutral_values_are_taken(client: OpenAI) -> None:
    neutral: dict[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me"}
    found = client.completions.create(prompt="a", best_of=1, suffix=None, **neutral, **GREEDY)
    assert found.choices[0].text == client.completions.create(prompt="a", **GREEDY).choices[0].text
    for refused in ({"suffix": "x"}, {"best_of": 2}, {"presence_penalty": True}):
        with pytest.raises(openai.BadRequestError, match=next(iter(refused))):
            client.completions.create(prompt="a", extra_body=refused, **GREEDY)


def test_prompts_that_cannot_be(client: OpenAI) -> None:
    for prompt, said in (("", "no tokens"), ([], "at least one"), ([1, 999], "287"), ([-1], "287"), ("a" * 600, "512")):
        with pytest.raises(openai.BadRequestError, match=said):
            client.completions.create(prompt=prompt, **GREEDY)
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"


def test_what_it_counts(server: Process, client: OpenAI) -> None:
    assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.root}/ready").status_code == 200
    before = counters(server)
    client.completions.create(prompt=[PROMPT, "b"], max_tokens=9, **GREEDY)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt="", **GREEDY)
    after = counters(server)
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    assert more["smoothquant_prompt_tokens_total"] == len(PROMPT.encode()) + 1
    assert more["smoothquant_generated_tokens_total"] == 18
    assert more['smoothquant_finished_total{reason="length"}'] == 2
    assert more['smoothquant_refusals_total{status="400"}'] == 1
    assert more["smoothquant_time_to_first_token_seconds_count"] == 2
    assert more["smoothquant_time_per_output_token_seconds_count"] == 2
    assert more["smoothquant_batch_size_sum"] == 16  # the first token comes with the prompt
    assert after["smoothquant_jobs_running"] == after["smoothquant_jobs_waiting"] == 0


def counters(server: Process) -> dict[str, float]:
    lines = httpx.get(f"{server.root}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}
