"""The tokenizer of a model or engine folder: text, pieces of a text and conversations to token ids.

A model folder is not trusted: Python code that comes with a tokenizer never runs. A chat template does run, in the
sandbox that transformers gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from act_scales.rows import Conversation
from smoothquant.errors import UserError, raise_refusal
from smoothquant.reading import check_small, read_json
from smoothquant.sidecars import SIDECARS

RESTORE = "copy tokenizer.json and tokenizer_config.json from where the model came from"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
BEFORE = 8  # tokens, behind which every decoder writes a token as in the middle of a text
SAVED_BY_5 = "TokenizersBackend"  # the class that transformers 5 names for what any reads from tokenizer.json


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder, as transformers loads it. Raises UserError if there is none that can be used.

    What this machine lacks is no fault of the folder: raises MemoryError, or OSError for no permission and for too many
    open files.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", expected="a model folder with its tokenizer")
    for name in SIDECARS:
        check_small(folder / name)
    kind: Any = AutoTokenizer
    if PreTrainedTokenizerFast.__name__ != SAVED_BY_5 and _saved_class(folder) == SAVED_BY_5:
        kind = PreTrainedTokenizerFast  # transformers 4, in which this is the name
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # every kind of tokenizer raises its own errors
        raise_refusal(error, folder)
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: its tokenizer is Python code of its own (auto_map), which never runs here",
                expected="a tokenizer that transformers knows by itself",
                do="if tokenizer.json is all that it needs, remove auto_map from tokenizer_config.json",
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: no usable tokenizer in it ({reason})", do=RESTORE) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that a tokenizer is made from."""
    return any((folder / name).exists() for name in VOCABULARIES)


def _saved_class(folder: Path) -> str:
    """The class that saved a tokenizer; empty if that cannot be read, of which transformers then says more."""
    return str(read_json(folder / "tokenizer_config.json").get("tokenizer_class", ""))


class TextStream:
    """The text of tokens that come one by one, in pieces of whole characters, which together are the text of all.

    decode: the function of a `TextEncoder`. after: the tokens that the text continues; none for a text of its own, of
    which some decoders drop the first space. A piece is decoded after the tokens of the piece before it, on which its
    spaces depend. What was given out stays, where some decoders would take it back: for bytes behind it that are no
    character.
    """

    def __init__(self, decode: Callable[[list[int]], str], after: Sequence[int] = ()) -> None:
        self._decode = decode
        self._before = list(after[-BEFORE:])
        self._piece: list[int] = []
        self._known = decode(self._before)

    def push(self, token: int) -> str:
        """The text that is whole with this token and was not before; empty for half of a character."""
        self._piece.append(token)
        text = self._decode(self._before + self._piece)
        if len(text) <= len(self._known) or text.endswith("\ufffd"):  # half of a character: wait for the rest
            return ""
        new = text[len(self._known) :]
        self._before, self._piece = self._piece, []
        self._known = self._decode(self._before)
        return new

    def end(self) -> str:
        """The text that is left behind the last token."""
        return self._decode(self._before + self._piece)[len(self._known) :]


class TextEncoder:
    """Token ids of texts, and texts of token ids.

    folder: where the tokenizer lies. ids: its function from a text, and whether its special tokens are to go around
    that, to token ids. decode: its function from token ids to their text, without special tokens. spell: its function
    from a token id to the token as the tokenizer writes it ("\u0120of"); None for an id that is none of its own.

    A text that has the special tokens around it already does not get them again.
    """

    def __init__(
        self,
        folder: str | Path,
        ids: Callable[[str, bool], list[int]],
        decode: Callable[[list[int]], str],
        spell: Callable[[int], str | None],
    ) -> None:
        self.folder, self._ids, self.decode, self.spell = folder, ids, decode, spell
        if not self.plain("a"):
            raise UserError(f"{folder}: its tokenizer gives no tokens for a text", do=RESTORE)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text as it stands."""
        return self._ids(text, False)

    def whole(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """Token ids of a text that comes in pieces, between its special tokens."""
        before, after = self._special
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids = self.plain(piece)
            if number == 0 and ids[: len(before)] != before:
                yield before
            yield ids
        if not after or ids[-len(after) :] != after:
            yield after

    @property
    def start(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text; none for many."""
        return self._special[0]

    def streamed(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Yield the text of tokens as they come: the pieces of a `TextStream`."""
        stream = TextStream(self.decode, after)
        for token in tokens:
            if piece := stream.push(token):
                yield piece
        if rest := stream.end():
            yield rest

    @cached_property
    def _special(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before a text and after it."""
        plain, whole = self._ids("a", False), self._ids("a", True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []


class Encoder(TextEncoder):
    """Token ids of texts and conversations, by the tokenizer of a folder, as transformers loads it.

    refused: why the chat template refused a conversation, one line for each that it did.
    """

    def __init__(self, folder: str | Path) -> None:
        self.tokenizer = tokenizer = load_tokenizer(folder)
        self.refused: list[str] = []

        def ids(text: str, special: bool) -> list[int]:
            return tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

        super().__init__(
            folder,
            ids,
            lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            tokenizer.convert_ids_to_tokens,
        )

    def chat(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation by the folder's chat template, which writes the special tokens that it wants.

        Empty for a conversation that the template refuses, as many do if turns do not alternate. Raises UserError if
        the folder has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{conversation.where}: a conversation, and {self.folder} has no chat template",
                expected="a chat model's folder: chat_template.jinja, or chat_template in tokenizer_config.json",
                do="copy the template from where the model came from, or name a field of plain text: --text-field NAME",
            )
        try:
            text = self.tokenizer.apply_chat_template(list(conversation.turns), tokenize=False)
        except Exception as error:  # whatever a template raises, or does with turns that it does not expect
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.refused.append(f"{conversation.where}: the chat template refuses this conversation ({reason})")
            return []
        return self.plain(text)

    def spelled(self, ids: list[int]) -> str:
        """The tokens as the tokenizer spells them: "<bos>"."""
        return " ".join(self.tokenizer.convert_ids_to_tokens(ids))
