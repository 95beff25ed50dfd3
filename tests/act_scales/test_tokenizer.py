"""What the tokenizer makes of texts and conversations is what transformers makes of them; its own code never runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from act_scales.text import DIVERSE, ENOUGH, Text, load_document, load_text
from act_scales.tokenizer import load_tokenizer
from smoothquant.errors import UserError
from tests.models import TEXT, save_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
)
TURNS = [{"role": "user", "content": f"What is {TEXT[:40]}?"}, {"role": "assistant", "content": "A line."}]


def flat(text: Text) -> list[int]:
    return torch.cat(text.sequences).tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer that puts <s> before a text and </s> after it, with a chat template that writes them itself."""
    folder = tmp_path / "model"
    save_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [("<s>", 256), ("</s>", 257)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def rows(path: Path, *found: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_conversations_go_through_the_chat_template(folder: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "chat.jsonl", {"id": "x" * 99, "messages": TURNS}, {"text": TEXT[:50]})
    theirs = AutoTokenizer.from_pretrained(folder)
    chat = theirs.apply_chat_template(TURNS, tokenize=True, return_dict=True)["input_ids"]
    found = flat(load_text(path, folder, 64, 32, started=False))
    assert found == chat + theirs(TEXT[:50])["input_ids"]
    assert found.count(256) == 2  # one for each document: the template's, and the tokenizer's


@pytest.mark.parametrize("written", ["{{ bos_token }}", ""])
def test_a_sequence_of_conversations_begins_with_one_bos(written: str, folder: Path, tmp_path: Path) -> None:
    """Whether the chat template writes it or not, and where a sequence begins with a conversation, too."""
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("{{ bos_token }}", written))
    path = rows(tmp_path / "chat.jsonl", *[{"messages": TURNS}] * 5)
    chat = AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert (chat[0] == 256) == bool(written)
    alone = [256] * (not written) + chat
    assert [list(one) for one in load_text(path, folder, 64, len(alone)).sequences] == [alone] * 5
    for sequence in load_text(path, folder, 64, 32).sequences:
        assert (sequence[0], sequence[1:2].tolist() == [256]) == (256, False)


def test_a_refused_conversation_is_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    refused = {"messages": [{"role": "system", "content": "Be kind."}, *TURNS]}
    path = rows(tmp_path / "chat.jsonl", refused, {"messages": TURNS}, refused)
    text = load_text(path, folder, 64, 32)
    assert flat(text) == flat(load_text(rows(tmp_path / "one.jsonl", {"messages": TURNS}), folder, 64, 32))
    assert "2 conversations are left out: " in text.doubts[-1]
    assert "chat.jsonl line 1: the chat template refuses this conversation (no system)" in text.doubts[-1]
    with pytest.raises(UserError, match=r"0 tokens of text; .*line 1: the chat template refuses .*no system"):
        load_text(rows(path, refused), folder, 64, 32)


def test_without_a_chat_template(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    path = rows(tmp_path / "chat.jsonl", {"messages": TURNS})
    with pytest.raises(UserError, match=r"line 1: a conversation, and .*model has no chat template; expected a chat"):
        load_text(path, folder, 64, 32)
    with pytest.raises(UserError, match=r"line 1: a conversation; expected plain text"):
        load_document(path, folder, 64, 32)


@pytest.mark.parametrize(
    ("document", "start", "end"),
    [(TEXT, "", ""), (f"<s>{TEXT}", "<s>", ""), (f"{TEXT}</s>", "", "</s>"), (f"<s>{TEXT}</s>", "<s>", "</s>")],
)
def test_no_special_token_twice(document: str, start: str, end: str, folder: Path, tmp_path: Path) -> None:
    expected = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    path = tmp_path / "text.txt"
    path.write_text(document)
    assert flat(load_text(path, folder, 1 << 20, 64, started=False)) == expected
    assert flat(load_document(path, folder, 1 << 20, 64)) == expected
    assert AutoTokenizer.from_pretrained(folder)(document)["input_ids"] != expected or not start + end  # the control


def test_poor_texts_are_doubted(llama_folder: Path, tmp_path: Path) -> None:
    def doubts(content: str) -> str:
        (tmp_path / "text.txt").write_text(content)
        return "; ".join(load_text(tmp_path / "text.txt", llama_folder, 512, 64).doubts)

    assert doubts(TEXT) == ""
    assert "32 tokens are too little" in doubts("a" * 32)
    assert "no more diverse than 1.0 equally frequent tokens" in doubts("a" * 32)
    assert doubts("a" * 2000) == doubts("a" * 1001).replace("1001", "2000")
    assert "too little" not in doubts("a" * 2000)
    assert "uniform" not in doubts(TEXT[: ENOUGH - 1])
    assert f"{ENOUGH - 1} tokens are too little" in doubts(TEXT[: ENOUGH - 1])


@pytest.mark.parametrize("kinds", [1, 8, 14, 16, 200])
def test_diversity_counts_equally_frequent_tokens(kinds: int) -> None:
    text = Text((torch.arange(kinds).repeat(10),), "t")
    assert text.diversity == pytest.approx(kinds)
    assert any("uniform" in line for line in text.doubts) == (kinds < DIVERSE)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_of_a_tokenizer_never_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the person, or `yes |`, would say yes."""
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T:\n    pass\n")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", "code.T"]}, tokenizer_class="T")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"is Python code of its own .auto_map., which never runs here") as caught:
        load_tokenizer(folder)
    assert "trust_remote_code" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_saved_by_transformers_5(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 4 does not know the class TokenizersBackend, and reads the same tokenizer.json by another name."""
    edit(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    expected = load_tokenizer(folder)(TEXT)["input_ids"]

    class Auto:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> object:
            raise ValueError("Tokenizer class TokenizersBackend does not exist or is not currently imported.")

    class PreTrainedTokenizerFast(transformers.PreTrainedTokenizerFast):
        pass

    monkeypatch.setattr(transformers, "AutoTokenizer", Auto)
    with pytest.raises(UserError, match=r"no usable tokenizer in it .Tokenizer class TokenizersBackend"):
        load_tokenizer(folder)  # the control
    monkeypatch.setattr(transformers, "PreTrainedTokenizerFast", PreTrainedTokenizerFast)
    assert load_tokenizer(folder)(TEXT)["input_ids"] == expected


@pytest.mark.parametrize("lack", [MemoryError(), OSError(24, "Too many open files"), PermissionError(13, "denied")])
def test_what_this_machine_lacks_is_no_fault_of_the_tokenizer(
    lack: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise lack

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(type(lack)):
        load_tokenizer(folder)
