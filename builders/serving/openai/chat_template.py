"""A model's chat template, rendered as transformers renders it, without transformers.

    chat_template.jinja       the template
    tokenizer_config.json     else here: chat_template, a template or a list of {"name", "template"}; and the special
                              tokens, which templates may write

A template is a program that comes with the model. It runs in Jinja's sandbox, which lets it change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from smoothquant.errors import UserError
from smoothquant.reading import read_json, read_text

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(Exception):
    """A template refuses a conversation; the message is the template's own."""


class ChatTemplate:
    """A chat template. source: Jinja. tokens: the special tokens, by name. where: names it in errors.

    Raises UserError for what is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        self._tokens = tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(
                f"{where}: no usable chat template ({error})", do="copy it from where the model came from"
            ) from error

    def render(self, turns: Sequence[Mapping[str, str]]) -> str:
        """The prompt for an answer to a conversation, with the special tokens that the template wants.

        Raises ChatTemplateError for a conversation that the template refuses, or that makes it fail.
        """
        try:
            return self._template.render(
                messages=[dict(turn) for turn in turns],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except Exception as error:  # whatever a template raises, or does with turns that it does not expect
            raise ChatTemplateError(str(error).strip() or type(error).__name__) from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of an engine's folder; None if it has none. Raises UserError for one that is broken."""
    config, file = read_json(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
    tokens = _special_tokens(read_json(folder / "special_tokens_map.json") | config)
    if file.exists():
        return ChatTemplate(read_text(file), tokens, str(file))
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    source = _default(config.get("chat_template"), where)
    return None if source is None else ChatTemplate(source, tokens, where)


def _default(found: Any, where: str) -> str | None:
    """The template, or that of the name "default"."""
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[-1].get("template") if named else ""
    if found is not None and (not isinstance(found, str) or not found):
        raise UserError(where, expected="a template, or templates with names, one of which is default")
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have names; they are written as texts, or as objects with a content."""
    found = {name: config.get(name) for name in SPECIAL}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class _Generation(Extension):
    """{% generation %} marks what an assistant wrote, for training; its content is the text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own annotation)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
