"""Chat templates give the text that transformers' own rendering gives, and refuse what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from builders.serving.openai.chat_template import ChatTemplateError, read_chat_template
from smoothquant.errors import UserError
from tests.models import save_tokenizer

TURNS = [
    {"role": "system", "content": '  Be <brief> & "exact".\n'},
    {"role": "user", "content": "né 🦙 {{ 7 * 7 }} {% raw %}"},
    {"role": "assistant", "content": "<b>yes</b>"},
    {"role": "user", "content": "more\n", "name": "me"},
]
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{{ bos_token }}\n  {% for message in messages %}\n    {%- if message.role == 'system' %}\n"
    "<<SYS>> {{ message.content | trim }}\n    {% elif loop.last %}{{ message.content | upper }}{{ eos_token }}\n"
    "    {% else %}\n{{ message['content'] | replace('é', 'e') }} {{ loop.index0 }}\n    {% endif %}\n  {% endfor %}\n",
    "tools": "{% set ns = namespace(count=0) %}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% continue %}{% endif %}{% set ns.count = ns.count + 1 %}{% if ns.count > 2 %}{% break %}{% endif %}"
    "{{ message | tojson }}{{ {'b': '<é>', 'a': [1, none]} | tojson(indent=2, sort_keys=true) }}{% endfor %}"
    "{% if tools is none %}no tools{% endif %}{% if documents %}some{% endif %}{{ unk_token }}|{{ nothing }}",
    "time": "{{ strftime_now('%Y') }}{% macro turn(m) %}[{{ m.role[:3] }}]{% endmacro %}{% for m in messages %}"
    "{{ turn(m) }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ dict(a=1).a }}"
    "{{ messages[::-1][0].name }}{{ range(3) | list }}",
}
REFUSES = {
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "unsafe": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "changes": ("{{ messages.append(1) }}", "unsafe"),
    "fails": ("{{ messages[0]['content'] + 1 }}", "concatenate"),
}


def model(folder: Path, template: object, *, file: bool) -> Path:
    """A folder with a tokenizer and a template, in a file of its own or in the tokenizer's settings."""
    save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if file:
        (folder / "chat_template.jinja").write_text(str(template), encoding="utf-8")
        template = "not this one"
    path.write_text(json.dumps(config | {"chat_template": template}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("file", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, file: bool, tmp_path: Path) -> None:
    folder = model(tmp_path, TEMPLATES[name], file=file)
    theirs = AutoTokenizer.from_pretrained(folder)
    for turns in (TURNS, TURNS[:1]):
        expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        found = read_chat_template(folder)
        assert found is not None
        assert found.render(turns) == expected
        assert expected


def test_of_several_templates_it_is_the_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TEMPLATES["chatml"]}]
    folder = model(tmp_path, named, file=False)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=True
    )
    found = read_chat_template(folder)
    assert found is not None
    assert found.render(TURNS) == expected


@pytest.mark.parametrize("name", REFUSES)
def test_what_a_template_refuses(name: str, tmp_path: Path) -> None:
    template, said = REFUSES[name]
    folder = model(tmp_path, template, file=True)
    with pytest.raises(Exception, match=re.escape(said)):
        AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, tokenize=False)
    found = read_chat_template(folder)
    assert found is not None
    with pytest.raises(ChatTemplateError, match=re.escape(said)):
        found.render(TURNS)


def test_folders_without_a_template(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    save_tokenizer(tmp_path)
    assert read_chat_template(tmp_path) is None
    for broken in ("{% for %}", [], 5, [{"name": "other", "template": "x"}]):
        with pytest.raises(UserError, match=r"tokenizer_config\.json: "):
            read_chat_template(model(tmp_path, broken, file=False))
