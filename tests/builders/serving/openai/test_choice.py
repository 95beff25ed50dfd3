"""Pieces of an answer: however its text is cut, and whatever strings end it."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from act_scales.tokenizer import TextEncoder
from builders.serving.jobs import End, Finished, Scored
from builders.serving.openai.answers import Spelling
from builders.serving.openai.choice import Choice, StopStrings

SHORT = st.text("ab\ufffd", max_size=4)


def by_bytes() -> TextEncoder:
    """A tokenizer of bytes; 256 is special."""

    def decode(tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    names = {256: "<end>", 0xC3: "<0xC3>"}
    return TextEncoder(Path("here"), lambda text, _: list(text.encode()), decode, names.get)


@given(st.lists(SHORT, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    """As far as the text goes: of two strings that begin in the same piece, the first is heard."""
    search = StopStrings(stops)
    given_out = ""
    for count, piece in enumerate(pieces, 1):
        new = search.push(piece)
        given_out += new
        come = "".join(pieces[:count])
        assert come.startswith(given_out)
        heard = [come.index(stop) for stop in stops if stop in come]
        assert search.found == bool(heard)
        if heard:
            assert given_out == come[: min(heard)]
            return
        held = come[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)  # no more than it must
        assert not any(stop.startswith(come[start:]) for stop in stops for start in range(len(given_out)))
    assert given_out + search.end() == "".join(pieces)


@given(st.binary(max_size=24), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_tokens_go_with_their_text(content: bytes, stops: list[str]) -> None:
    """Every token once, none behind a stop string, and none before its text."""
    choice = Choice(by_bytes(), stops)
    text, tokens, reason = "", [], ""
    for event in (*map(Scored, content), Finished(End.LENGTH)):
        piece = choice.take(event)
        text += piece.text
        tokens += piece.tokens
        reason = piece.reason
        assert all(token.offset <= len(text) for token in piece.tokens)
    assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)
    assert [token.scored.token for token in tokens] == list(content[: len(tokens)])
    assert reason == ("stop" if choice.stopped else "length")
    if not choice.stopped:
        assert len(tokens) == len(content)
        assert text == "".join(by_bytes().streamed(content))
    assert not any(stop in text for stop in stops)


def test_names_of_tokens() -> None:
    spelling = Spelling(by_bytes())
    assert spelling(ord("e")) == ("e", b"e")
    assert spelling(ord(" ")) == (" ", b" ")
    assert spelling(0xC3) == ("bytes:\\xc3", b"\xc3")
    assert spelling(256) == ("<end>", b"<end>")
    assert spelling(300) == ("<300>", b"<300>")
