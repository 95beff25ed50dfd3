"""Small files of others: whatever lies there, one error that says why, at once, in little memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoothquant.errors import CheckpointError, UserError
from smoothquant.reading import DIGITS, LARGEST, parse_json, read_bytes, read_json, read_object
from tests.faults import FAULTS, WORDS


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_json_object(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    FAULTS[fault](path)
    with pytest.raises(CheckpointError) as found:
        read_object(path, CheckpointError, do="do that")
    said = str(found.value)
    assert said.startswith(f"{path}: ")
    assert WORDS[fault] in said
    assert said.endswith("; do that")
    assert len(said) < 400
    assert read_json(path) == {}


def test_what_is_one(tmp_path: Path) -> None:
    """The control."""
    path = tmp_path / "a.json"
    for content in ({}, {"a": [1, 10**DIGITS // 10, 1.5, None, "é \U0001f469"]}):
        path.write_text(json.dumps(content))
        assert read_object(path) == read_json(path) == content
    (tmp_path / "link.json").symlink_to(path)
    assert read_object(tmp_path / "link.json") == content


def test_names_that_no_file_has(tmp_path: Path) -> None:
    for name in ("nul\0.json", "x" * 300, "file/inner.json"):
        (tmp_path / "file").write_text("{}")
        with pytest.raises(UserError, match="cannot be read"):
            read_bytes(tmp_path / name)


def test_what_the_machine_refuses_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    for read in (read_bytes, read_object, read_json):
        with pytest.raises(PermissionError):
            read(tmp_path / "a.json")


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read than was allowed."""
    (tmp_path / "a").write_bytes(b"x" * 1000)
    assert read_bytes(tmp_path / "a", most=1000) == b"x" * 1000
    with pytest.raises(UserError, match="1000 bytes; expected at most 999"):
        read_bytes(tmp_path / "a", most=999)


def test_a_hole_takes_no_memory(tmp_path: Path) -> None:
    """The largest file that is read, in a process that may take little more."""
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 2**40)
    program = (
        "import sys\nfrom pathlib import Path\nfrom smoothquant.reading import read_json\nread_json(Path(sys.argv[1]))"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 * LARGEST, 4 * LARGEST))

    subprocess.run([sys.executable, "-c", program, path], check=True, preexec_fn=limit, timeout=60)


VALUES: st.SearchStrategy = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**99), 10**99) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES)
def test_json_is_that_of_the_standard_library(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@given(st.text(alphabet='[]{}",:0123456789.eE+-\\untrfals', max_size=40))
def test_what_is_refused_is_a_value_error(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r".+"):
            parse_json(text)
    else:
        assert parse_json(text) == expected
