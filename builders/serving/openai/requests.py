"""What clients may ask: the bodies of OpenAI's two requests.

A field that this server does not know is refused by name, and so is a field of OpenAI's that it does not support, but
for the values that ask for nothing (`NEUTRAL`). Nothing is ignored but `IGNORED`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from builders.serving.openai.errors import ApiError, invalid
from smoothquant.reading import DIGITS

MOST_CHOICES = 128  # continuations of one prompt
LONGEST_STOP = 1000  # characters of a stop string
SEEDS = (-(2**63), 2**64 - 1)

Prompt: TypeAlias = str | list[int]
M = TypeVar("M", bound=BaseModel)

NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # field that is not supported -> values that ask for nothing
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),  # there are no tools
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),  # of other servers; load generators send it
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
IGNORED = ("user", "safety_identifier", "prompt_cache_key")  # strings that identify who asks
OF_MESSAGES = ("annotations", "audio", "function_call", "refusal", "tool_call_id", "tool_calls")  # null in old answers


def parse(body: bytes, kind: type[M]) -> M:
    """The request in a body. Raises ApiError, which says what is wrong and in which field."""
    return _validated(_read(body), kind)


def parse_either(body: bytes, model: str) -> ChatRequest | CompletionRequest:
    """The request in a body that is either of the two, by its field. model: the name, where the body has none.

    Raises ApiError as `parse` does.
    """
    content = _read(body)
    if ("messages" in content) == ("prompt" in content):
        raise invalid("expected one of the fields messages, for a chat, and prompt, for a completion")
    if content.get("model") is None:
        content["model"] = model
    return _validated(content, ChatRequest) if "messages" in content else _validated(content, CompletionRequest)


def _read(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError for another body."""
    try:
        content = json.loads(body.decode(), parse_int=_whole, parse_constant=_no_number)
        if rb"\u" in body:
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise invalid("a text of the body has half of a surrogate pair") from error
    except RecursionError as error:
        raise invalid("the body is not JSON that can be read: nested too deep") from error
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise invalid("the body is no JSON object")
    return content


def _validated(content: dict[str, Any], kind: type[M]) -> M:
    """The request of this kind. Raises ApiError for content that is none."""
    try:
        return kind.model_validate(_supported(content, kind))
    except ValidationError as error:
        raise _first(error) from error


def _supported(content: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """The fields that a request of this kind has. Raises ApiError for others that ask for something."""
    found = {}
    for name, value in content.items():
        if name in kind.model_fields:
            found[name] = value
        elif name in NEUTRAL:
            if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
                raise invalid(f"{name}: this server does not support it", name, "unsupported_parameter")
        elif name not in IGNORED:
            raise invalid(f"{name}: this server does not know this field", name, "unknown_parameter")
        elif value is not None and not isinstance(value, str):
            raise invalid(f"{name}: expected a string", name)
    return found


def _same(value: object, neutral: object) -> bool:
    """Whether they are equal; of JSON's values true is not 1, as it is in Python."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _first(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ""
    for part in found["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else part
    message = found["msg"].removeprefix("Value error, ")
    return invalid(f"{where}: {message}" if where else message, where or None)


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


def _prompts(value: object) -> list[Prompt]:
    """The prompts of a completion: a text, texts, token ids, or lists of those."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return [value]
        if all(isinstance(prompt, str) for prompt in value):
            return value
        if all(isinstance(prompt, list) and all(type(token) is int for token in prompt) for prompt in value):
            return value
    raise ValueError("expected a text, texts, token ids or lists of token ids, at least one")


def _stops(value: object) -> tuple[str, ...]:
    """Stop strings: none, one, or up to four."""
    found = () if value is None else (value,) if isinstance(value, str) else value
    if isinstance(found, tuple | list) and len(found) <= 4:
        texts = tuple(text for text in found if isinstance(text, str) and 0 < len(text) <= LONGEST_STOP)
        if len(texts) == len(found):
            return texts
    raise ValueError(f"expected a text or up to four, of 1 to {LONGEST_STOP} characters each")


def _content(value: object) -> str:
    """The text of a message, which may come in parts; they are joined by line ends."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [part["text"] for part in value if isinstance(part, dict) and part.keys() == {"type", "text"}]
        kinds = {part["type"] for part in value if isinstance(part, dict) and isinstance(part.get("type"), str)}
        if len(texts) == len(value) and kinds == {"text"} and all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
    raise ValueError('expected a text, or parts of the form {"type": "text", "text": TEXT}')


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """include_usage: whether a last chunk tells the numbers of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Asked(_Strict):
    """The fields that both requests have; null stands for a field that is not there."""

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    ignore_eos: bool | None = None  # of other servers; load generators send it

    @model_validator(mode="after")
    def _streams(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected stream, too")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: expected the same number as n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: expected 1 or more, or echo")
        return self


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Without the fields that OpenAI's client sends back from an answer with nothing in them."""
        if not isinstance(value, dict):
            return value
        return {name: found for name, found in value.items() if name not in OF_MESSAGES or found not in (None, [])}

    @property
    def turn(self) -> dict[str, str]:
        """The message as chat templates take it. A developer is the system, which is the word that they know."""
        found = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return found if self.name is None else found | {"name": self.name}


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs, too")
        if self.max_tokens == 0:
            raise ValueError("max_tokens: expected 1 or more")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: expected max_completion_tokens alone")
        return self
