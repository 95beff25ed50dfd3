"""Documents out of files and data sets, and one clear line for what cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import zstandard

from act_scales.rows import Conversation
from act_scales.sources import CHUNK, documents
from smoothquant.errors import MissingPackageError, UserError

ROWS = [{"id": "7", "url": "no", "text": "first\nrow"}, {"id": "8", "text": "second", "n": 3}, {"text": "thörd"}]
READ = ["first\nrow", "second", "thörd"]
TURNS = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, ünit"})
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi, ünit"}]


def read(source: str | Path) -> list[str]:
    return ["".join(document) for document in documents(source) if not isinstance(document, Conversation)]


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_txt_is_one_document(tmp_path: Path) -> None:
    content = "a line, né\n\n" * CHUNK
    for encoding in ("utf-8", "utf-8-sig"):  # with a byte order mark too
        (tmp_path / "a.txt").write_text(content, encoding=encoding)
        assert read(tmp_path / "a.txt") == [content]


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS) + "\n  \n" + lines([{"text": " \n"}, {"text": ""}]))
    assert read(tmp_path / "a.jsonl") == READ


def test_compressed_json_lines(tmp_path: Path) -> None:
    frames = [zstandard.compress(line.encode()) for line in lines(ROWS).splitlines(keepends=True)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.jsonl.zst") == READ


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "cut off', "line 3: not JSON"),
        ("[1, 2]", "line 3: no text in it"),
        ('"text"', "line 3: no text in it"),
        (
            '{"id": "3", "text": null}',
            "line 3: no text in text or messages or conversations; its fields are 'id', 'text'",
        ),
        ('{"id": "3", "ur\\u001bl": "http"}', r"line 3: .* its fields are 'id', 'ur\\x1bl'"),
        ('{"messages": []}', "line 3: no text in"),
        ('{"messages": ["Hello"]}', "line 3, field 'messages': a turn that is str"),
        ('{"messages": [{"role": "user"}]}', "line 3, field 'messages': a turn with 'role'"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "line 3, .*: a turn with 'role', 'content'",
        ),
        (
            '{"conversations": [{"from": "owl", "value": "hoo"}]}',
            "line 3, .*: a turn from 'owl'",
        ),
        ('{"text": "half \\ud83d"}', r"line 3: half of a surrogate pair, '.ud83d'"),
        ('{"conversations": [{"from": "gpt", "value": "\\udc00"}]}', "line 3, field 'conversations': half of a surrog"),
        ("[" * 100_000, r"line 3: not JSON \(nested too deep\)"),
        ('{"text": ' + "9" * 5000 + "}", "line 3: "),
    ],
)
def test_a_malformed_line_is_named(line: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS[:2]) + line + "\n" + lines(ROWS))
    with pytest.raises(UserError, match=rf"a\.jsonl {fault}.*; expected"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_a_line_that_does_not_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of /dev/zero: no more is read than a line may have."""
    monkeypatch.setattr("act_scales.sources.LONGEST", 200_000)
    row = lines([{"text": "x" * 150_000}])
    content = row + "x" * 400_000
    (tmp_path / name).write_bytes(zstandard.compress(content.encode()) if name.endswith("zst") else content.encode())
    found = documents(tmp_path / name)
    assert list(next(found)) == ["x" * 150_000]
    with pytest.raises(UserError, match=rf"{name}: a line of more than 200000 characters; expected one JSON object"):
        next(found)
    if name.endswith("jsonl"):
        (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
        with pytest.raises(UserError, match="a line of more than"):
            list(documents(tmp_path / "endless.jsonl"))


def test_a_field_is_named_not_guessed(tmp_path: Path) -> None:
    rows = [{"id": "a", "body": "first", "text": "other"}, {"body": SHAREGPT, "id": "b"}, {"body": " "}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    first, second = documents(tmp_path / "a.jsonl", "body")
    assert list(first) == ["first"]
    assert isinstance(second, Conversation)
    assert second.turns == TURNS
    with pytest.raises(UserError, match="line 3: no text in 'id'; its fields are 'body'"):
        list(documents(tmp_path / "a.jsonl", "id"))
    (tmp_path / "a.txt").write_text("a text has no fields")
    assert ["".join(whole) for whole in documents(tmp_path / "a.txt", "body")] == ["a text has no fields"]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "QWJhYe7_0", "conversations": SHAREGPT},
        {"prompt_id": "x", "messages": list(TURNS), "conversations": []},
        {"text": None, "messages": [TURNS[0], {**TURNS[1], "content": [{"type": "text", "text": "Hi, ünit"}]}]},
    ],
)
def test_conversations(row: dict, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([row]))
    [found] = documents(tmp_path / "a.jsonl")
    assert isinstance(found, Conversation)
    assert found.turns == TURNS
    assert found.where.endswith("a.jsonl line 1")


def test_a_corrupt_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"this is not zstandard")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: corrupt"):
        read(path)
    path.write_bytes(zstandard.compress(lines(ROWS * 100).encode())[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst"):
        read(path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 99)
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "folder.txt").mkdir()
    for name, fault in {
        "latin.txt": "not UTF-8 text",
        "table.csv": "cannot tell what kind of text this is; expected a .txt, .jsonl or .jsonl.zst file, or hf:",
        "folder.txt": "cannot be read",
        "missing.txt": "cannot be read .No such file",
        "missing": "cannot tell what kind",
    }.items():
        with pytest.raises(UserError, match=rf"{name}: {fault}"):
            read(tmp_path / name)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source, package in ((tmp_path / "a.jsonl.zst", "zstandard"), ("hf:org/name", "datasets")):
        with pytest.raises(MissingPackageError, match=f"pip install {package}"):
            read(source)


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`org/name`, as the library finds it in a folder: two splits, two configurations."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(lines([{"n": 1, "text": "train 1"}, {"n": 2, "text": "train 2"}]))
    (folder / "test.jsonl").write_text(lines([{"n": 1, "text": "test 1"}, {"n": 2, "text": ""}]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  default: true\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: test\n    path: test.jsonl\n- config_name: other\n  data_files: test.jsonl\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("data_set")
@pytest.mark.parametrize("offline", [False, True])
def test_data_sets(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    assert read("hf:org/name") == ["train 1", "train 2"]
    assert read("hf:org/name:test") == ["test 1"]
    assert read("hf:org/name/plain:test") == ["test 1"]
    assert read("hf:org/name/other") == ["test 1"]
    for wrong in ("hf:org/name:nosuch", "hf:org/name/nosuch"):
        with pytest.raises(UserError, match=rf"{wrong}: cannot be loaded.*check name, config, split") as caught:
            read(wrong)
        assert "\n" not in str(caught.value)


def test_a_misspelt_data_set_is_refused() -> None:
    for wrong in ("hf:", "hf:name", "hf:org/", "hf:org/name:", "hf:/name"):
        with pytest.raises(UserError, match=r"expected hf:ORG/NAME\[/CONFIG\]\[:SPLIT\]"):
            read(wrong)


def test_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="hf:nobody/nothing: cannot be loaded") as caught:
        read("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
