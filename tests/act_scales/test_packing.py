"""Token sequences are the token stream, cut: nothing lost, doubled or padded."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from act_scales.text import PIECE, Text, load_text, pack, pieces, token_stream
from act_scales.tokenizer import Encoder
from smoothquant.errors import UserError
from smoothquant.model import Model
from tests.models import TEXT

parts = st.lists(st.lists(st.integers(0, 2**31), max_size=9), max_size=12)
characters = st.text(st.sampled_from("ab\n .é"), max_size=200)


@pytest.fixture
def framing_folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A tokenizer that puts <s> before every text and </s> after it."""
    tokenizer = Tokenizer.from_file(str(llama_folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((llama_folder / "tokenizer_config.json").read_bytes())
    return tmp_path


def flat(text: Text) -> list[int]:
    return torch.cat(text.sequences).tolist()


@given(parts, st.integers(1, 5), st.integers(1, 8))
def test_sequences_are_the_stream_cut(stream: list[list[int]], samples: int, length: int) -> None:
    found = pack(stream, samples, length)
    ids = [token for part in stream for token in part]
    assert [token for sequence in found for token in sequence.tolist()] == ids[: samples * length]
    assert all(len(sequence) == length for sequence in found[:-1])
    assert all(sequence.dtype == torch.int64 for sequence in found)


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=12),
    st.integers(1, 5),
    st.integers(3, 8),
    st.sampled_from([[1], [1, 2]]),
)
def test_every_sequence_begins_with_the_start_once(
    stream: list[list[int]], samples: int, length: int, start: list[int]
) -> None:
    """Ids are few, so that the stream has the start by itself in many places."""
    ids = [token for part in stream for token in part]
    for sequence in map(torch.Tensor.tolist, pack(stream, samples, length, start)):
        added = 0 if ids[: len(start)] == start else len(start)
        assert sequence[: len(start)] == start
        assert sequence[added:] == ids[: length - added]
        ids = ids[length - added :]
        samples -= 1
    assert not ids or not samples


@given(parts, st.integers(1, 5), st.integers(1, 8))
def test_no_more_is_read_than_needed(stream: list[list[int]], samples: int, length: int) -> None:
    asked: list[int] = []

    def watched() -> Iterator[list[int]]:
        for part in stream:
            assert len(asked) < samples * length
            asked.extend(part)
            yield part

    pack(watched(), samples, length)


def test_an_endless_source_ends(llama_folder: Path) -> None:
    endless = (["word "] for _ in itertools.count())
    assert len(pack(token_stream(endless, Encoder(llama_folder)), 4, 10)) == 4


@given(st.lists(characters, max_size=6), st.integers(1, 60))
def test_pieces_are_the_text_cut(chunks: list[str], limit: int) -> None:
    found = list(pieces(chunks, limit))
    assert "".join(found) == "".join(chunks)
    assert all(0 < len(piece) <= limit for piece in found)


def test_cuts_leave_the_tokens_as_they_are() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=600, show_progress=False))
    whole, limit = tokenizer.encode(TEXT).ids, 150
    for text in (TEXT, TEXT.replace("\n", " "), TEXT.replace("\n", "\n\n    ")):
        whole = tokenizer.encode(text).ids
        assert [token for piece in pieces([text], limit) for token in tokenizer.encode(piece).ids] == whole
        naive = (text[start : start + limit] for start in range(0, len(text), limit))
        assert [token for piece in naive for token in tokenizer.encode(piece).ids] != whole


def test_documents_stand_between_their_special_tokens(framing_folder: Path, tmp_path: Path) -> None:
    documents = [f"document {n}: {TEXT[n : 2 * n]}" for n in range(1, 40)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"id": "x", "text": document}) + "\n" for document in documents))
    tokenizer = AutoTokenizer.from_pretrained(framing_folder)
    stream = [token for document in documents for token in tokenizer(document)["input_ids"]]
    assert stream[0] == 256
    assert flat(load_text(path, framing_folder, samples=10**6, length=16, started=False)) == stream
    assert flat(load_text(path, framing_folder, samples=5, length=16, started=False)) == stream[:80]


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(framing_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:1000])
    text = load_text(path, framing_folder, samples=10**6, length=16)
    tokenizer = AutoTokenizer.from_pretrained(framing_folder)
    begun = tokenizer("", add_special_tokens=True)["input_ids"][:1]  # <s> </s>
    body = tokenizer(TEXT[:1000])["input_ids"][1:]
    assert [list(sequence) for sequence in text.sequences] == [
        begun + body[start : start + 15] for start in range(0, len(body), 15)
    ]
    assert len(text.sequences[-1]) == 1 + 1001 % 15
    assert text.sequence_start == "<s>"
    stream = load_text(path, framing_folder, samples=10**6, length=16, started=False)
    assert stream.sequence_start == ""
    assert stream.fingerprint != text.fingerprint


def test_a_tokenizer_that_adds_nothing_changes_nothing(llama_folder: Path, text_file: Path) -> None:
    started, not_started = (load_text(text_file, llama_folder, 5, 16, started=started) for started in (True, False))
    assert started.fingerprint == not_started.fingerprint
    assert started.sequence_start == ""


def test_a_sequence_has_room_for_more_than_its_start(framing_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    with pytest.raises(UserError, match=r"of 1 tokens, which the tokenizer begins with <s>; expected at least 2"):
        load_text(path, framing_folder, samples=64, length=1)
    assert load_text(path, framing_folder, samples=64, length=2).tokens == 128
    assert load_text(path, framing_folder, samples=64, length=1, started=False).tokens == 64


def test_a_long_document_is_one_document(framing_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 5)
    assert len(TEXT * 5) > 2 * PIECE
    expected = AutoTokenizer.from_pretrained(framing_folder)(TEXT * 5)["input_ids"]
    assert flat(load_text(path, framing_folder, samples=10**6, length=512, started=False)) == expected


def test_the_same_text_gives_the_same_sequences(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    first, second = (load_text(text_file, llama_folder, samples=4, length=100) for _ in range(2))
    assert [sequence.tolist() for sequence in first.sequences] == [sequence.tolist() for sequence in second.sequences]
    assert first.fingerprint == second.fingerprint
    assert (first.tokens, first.length, first.source) == (400, 100, "text.txt")
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    assert load_text(copy, llama_folder, samples=4, length=100).fingerprint == first.fingerprint
    for samples, length in ((5, 100), (4, 99), (8, 50)):  # 8 x 50 are the same tokens, cut otherwise
        assert load_text(text_file, llama_folder, samples, length).fingerprint != first.fingerprint


def test_a_short_text_ends_in_a_shorter_sequence(llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 70)  # a token per byte, no special tokens
    assert [len(sequence) for sequence in load_text(path, llama_folder, 8, 32).sequences] == [32, 32, 6]


@pytest.mark.parametrize("content", ["", "too short", "x" * 31])
def test_too_short_a_text_is_refused(content: str, llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"text\.txt: {len(content)} tokens of text; expected at least 32 "):
        load_text(path, llama_folder, 8, 32)


def test_nonsense_sizes_are_refused(llama_folder: Path, text_file: Path) -> None:
    for samples, length in ((0, 8), (8, 0), (-1, 8)):
        with pytest.raises(UserError, match="expected at least 1"):
            load_text(text_file, llama_folder, samples, length)


def test_tokens_that_the_model_lacks_are_refused(llama: Model) -> None:
    size = llama.geometry.vocab_size
    assert Text((torch.tensor([0, size - 1]),), "t").for_model(llama).tokens == 2
    with pytest.raises(UserError, match=rf"token id {size}; expected ids below {size}.*the tokenizer that came with"):
        Text((torch.tensor([0, 1]), torch.tensor([size])), "t").for_model(llama)


def test_more_tokens_than_positions_are_refused(make_llama: Callable[..., Path], text_file: Path) -> None:
    from tests.models import open_llama

    folder = make_llama(max_position_embeddings=40)
    load_text(text_file, folder, 2, 40).for_model(open_llama(folder))
    with pytest.raises(UserError, match="sequences of 41 tokens; expected at most 40"):
        load_text(text_file, folder, 2, 41).for_model(open_llama(folder))


def test_a_missing_or_broken_tokenizer_is_one_line(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_text(text_file, tmp_path / "nowhere", 2, 32)
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    for content in (None, "{broken", "{}", (llama_folder / "tokenizer.json").read_text()[:5000]):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="no usable tokenizer in it") as caught:
            load_text(text_file, tmp_path, 2, 32)
        assert "\n" not in str(caught.value)
