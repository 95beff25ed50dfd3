"""The tokenizer that an export keeps gives the ids and the texts of transformers, whichever files those come from."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer

from act_scales.kept_tokenizer import KEPT, engine_encoder, kept_form
from act_scales.tokenizer import Encoder, TextEncoder
from recipes import tiny_llama
from smoothquant.artifacts.manifest import FileFacts, Manifest
from smoothquant.errors import MissingPackageError, UserError
from smoothquant.files import make_folder
from smoothquant.outputs import FORMAT
from tests.models import save_tokenizer

TEXTS = (
    "",
    " ",
    "hello world",
    "  two spaces, a tab\tand\n\nlines ",
    "a</s>b<s>",
    "<s>hello",
    "hello</s>",
    "naïve ﬁne Å 日本語 🦙👩‍👩‍👧",
    "it 's , \u0000\u2581 x .",
    "<unk><pad>",
)


def write(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content))


def plain(folder: Path) -> None:
    save_tokenizer(folder)


def surrounded(folder: Path) -> None:
    """With special tokens on both sides, and settings that cut and pad what a tokenizer is not asked to."""
    save_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [("<s>", 256), ("</s>", 257)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=tokens)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_token="<s>", pad_id=256)
    tokenizer.save(str(folder / "tokenizer.json"))


def by_its_config(folder: Path) -> None:
    """Its tokenizer.json has no special tokens around a text; tokenizer_config.json adds them, and one of its own."""
    save_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", **config, add_bos_token=True, add_eos_token=True, pad_token="<pad>")


def rebuilt(folder: Path) -> None:
    """Of a class that transformers builds anew from the vocabulary, as it does for Llama 2."""
    characters = [chr(code) for code in range(33, 127)]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters, "▁h", "▁he"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("▁", "h"), ("▁h", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Lowercase()  # which transformers drops
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True, **names)


def without_a_file(folder: Path) -> None:
    """With vocab.json and merges.txt, as GPT-2's first users had it."""
    save_tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    write(folder / "vocab.json", **vocabulary, he=258)
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    write(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", bos_token="<s>", eos_token="</s>")


def bundled(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama.PATH / name, folder / name)


KINDS: dict[str, Callable[[Path], None]] = {
    make.__name__: make for make in (plain, surrounded, by_its_config, rebuilt, without_a_file, bundled)
}


def kept(folder: Path, **facts: FileFacts) -> TextEncoder:
    """The encoder of an engine that keeps what its export made of a folder."""
    form = kept_form(folder)
    assert form is not None
    make_folder((folder / KEPT).parent)
    (folder / KEPT).write_text(form)
    return engine_encoder(folder, Manifest(FORMAT, "export onnx", {}, {KEPT: FileFacts(0, ""), **facts}, {}))


@pytest.fixture(scope="module", params=KINDS)
def encoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextEncoder, Encoder]:
    """What is kept, and transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](folder)
    ours = kept(folder)
    assert type(ours) is TextEncoder
    return ours, Encoder(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_those_of_transformers(text: str, encoders: tuple[TextEncoder, Encoder]) -> None:
    ours, theirs = encoders
    ids = list(chain(*theirs.whole([text])))
    assert list(chain(*ours.whole([text]))) == ids
    assert ours.plain(text) == theirs.tokenizer(text, add_special_tokens=False)["input_ids"]
    for start in range(len(ids)):
        assert ours.decode(ids[start:]) == theirs.tokenizer.decode(ids[start:], skip_special_tokens=True)


@given(data=st.data())
def test_a_stream_is_the_text_of_all(data: st.DataObject, encoders: tuple[TextEncoder, Encoder]) -> None:
    """Only whole characters are shown before the end."""
    ours, theirs = encoders
    texts = st.text() | st.text("he </s>▁日🦙", max_size=20)
    ids = data.draw(texts.map(theirs.plain))
    if "ByteFallback" not in theirs.tokenizer.backend_tokenizer.to_str():  # which takes a character back for bad bytes
        ids += data.draw(st.lists(st.integers(0, len(theirs.tokenizer) - 1), max_size=9))
    pieces = list(ours.streamed(iter(ids)))
    assert "".join(pieces) == theirs.decode(ids)
    assert all(piece and not piece.endswith("\ufffd") for piece in pieces[:-1])


@pytest.mark.parametrize("text", ["hello he world, he", "a </s> b 日本 c"])
def test_a_text_goes_on_with_its_spaces(text: str, encoders: tuple[TextEncoder, Encoder]) -> None:
    """Behind a prompt, as in the middle of a text: Llama 2's decoder drops the first space of a text."""
    ours, _ = encoders
    ids = ours.plain(text)
    cuts = [cut for cut in range(1, len(ids)) if not ours.decode(ids[:cut]).endswith("\ufffd")]
    assert len(cuts) > 3
    for cut in cuts:
        assert ours.decode(ids[:cut]) + "".join(ours.streamed(ids[cut:], ids[:cut])) == ours.decode(ids)


def test_a_file_does_not_say_how_it_is_read(tmp_path: Path) -> None:
    """The control: the package tokenizers reads another tokenizer from the same file."""
    rebuilt(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode("hello World").ids != AutoTokenizer.from_pretrained(tmp_path)("hello World")["input_ids"]


def test_what_only_transformers_does_is_not_kept(tmp_path: Path) -> None:
    """It takes away spaces before a full stop here, after the decoder of the file."""
    pieces = [("<unk>", 0.0), *((chr(code), -float(code)) for code in range(32, 127))]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    write(tmp_path / "tokenizer_config.json", **names, clean_up_tokenization_spaces=False)
    assert kept_form(tmp_path) is not None
    write(tmp_path / "tokenizer_config.json", **names, clean_up_tokenization_spaces=True)
    assert kept_form(tmp_path) is None
    encoder = engine_encoder(tmp_path, Manifest(FORMAT, "export onnx", {}, {}, {}))
    assert encoder.decode(encoder.plain("so .")) == "so."


@pytest.mark.parametrize("content", [None, "{}", '{"model": 1}'])
def test_no_tokenizer_is_kept_of_a_folder_without_one(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    assert kept_form(tmp_path) is None


def test_a_tokenizer_that_was_changed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(tmp_path)
    changed = {"tokenizer_config.json": FileFacts(0, "", accepted=True)}
    assert isinstance(kept(tmp_path, **changed), Encoder)
    assert not isinstance(kept(tmp_path, **{"chat_template.jinja": FileFacts(0, "", accepted=True)}), Encoder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"its tokenizer_config.json was changed, so transformers .*convert"):
        engine_encoder(tmp_path, Manifest(FORMAT, "export onnx", {}, {KEPT: FileFacts(0, ""), **changed}, {}))
    with pytest.raises(MissingPackageError, match=r"it has no smoothquant/tokenizer.json, so transformers .*convert"):
        engine_encoder(tmp_path, Manifest(FORMAT, "export onnx", {}, {}, {}))


def test_a_kept_tokenizer_that_is_damaged(tmp_path: Path) -> None:
    make_folder((tmp_path / KEPT).parent)
    for content in (b"", b"\xff", b'{"model": {}}'):
        (tmp_path / KEPT).write_bytes(content)
        with pytest.raises(UserError, match=r"smoothquant/tokenizer.json: no usable tokenizer"):
            engine_encoder(tmp_path, Manifest(FORMAT, "export onnx", {}, {KEPT: FileFacts(0, "")}, {}))
