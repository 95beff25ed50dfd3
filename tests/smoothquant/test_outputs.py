"""Finished outputs: what is in them is what was written, and nobody else's files come to harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from smoothquant.artifacts.seal import opened, sealed
from smoothquant.errors import OutputError, UserError
from smoothquant.files import is_within, write_json
from smoothquant.outputs import (
    CACHE,
    MANIFEST,
    TOP_MANIFEST,
    accept,
    check_apart,
    check_content,
    check_replaceable,
    is_output,
    load_manifest,
)
from smoothquant.reading import read_json
from smoothquant.workspace import Workspace

FILES = {"weights.safetensors": "weights", "chat_template.jinja": "template", "deep/config.json": "{}"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    with Workspace(tmp_path / "out", "export test", {"model": "a"}) as work:
        for name, content in FILES.items():
            work.path(name).write_text(content)
        work.commit({"note": 1})
    return tmp_path / "out"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def reseal(out: Path, **changes: object) -> None:
    """A manifest that somebody wrote by hand, and sealed as we do."""
    inner = opened(read_json(out / MANIFEST))
    assert inner
    write_json(out / MANIFEST, sealed({**inner, **changes}))


# -- what is there ---------------------------------------------------------------------------------------------------


def test_a_whole_output(out: Path) -> None:
    manifest = load_manifest(out)
    assert set(manifest.files) == set(FILES)
    assert manifest.nbytes == sum(map(len, FILES.values()))
    assert is_output(out)
    check_content(out, manifest)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("again", [False, True])
def test_a_flipped_bit_in_a_file_is_refused(name: str, again: bool, out: Path) -> None:
    check_content(out, load_manifest(out), again=again)
    for place in range(len(FILES[name])):
        flip(out / name, place)
        with pytest.raises(UserError, match=rf"{name}: its content is not what was written; expected SHA-256") as found:
            check_content(out, load_manifest(out), again=again)
        assert ("--accept" in str(found.value)) == (not name.endswith(".safetensors"))
        flip(out / name, place)
    check_content(out, load_manifest(out), again=again)


def test_a_flipped_bit_in_the_manifest_is_refused(out: Path) -> None:
    for place in range((out / MANIFEST).stat().st_size):
        flip(out / MANIFEST, place)
        with pytest.raises(UserError):
            load_manifest(out)
        flip(out / MANIFEST, place)
    load_manifest(out)


@pytest.mark.parametrize("key", ["step", "inputs", "files", "versions", "results"])
def test_a_manifest_that_was_changed_by_hand_is_refused(key: str, out: Path) -> None:
    content = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(content))  # other spaces are no change
    load_manifest(out)
    (out / MANIFEST).write_text(json.dumps({**content, key: {} if key != "step" else "other"}))
    with pytest.raises(UserError, match=r"manifest\.json: changed or damaged since it was written"):
        load_manifest(out)
    unsealed = {name: value for name, value in content.items() if name != "sha256"}
    (out / MANIFEST).write_text(json.dumps(unsealed))
    with pytest.raises(UserError, match=r"manifest\.json: changed or damaged since it was written"):
        load_manifest(out)


@pytest.mark.parametrize("name", ["../precious", "/etc/passwd", "deep/../../precious", "..", "", "a\0b"])
def test_names_outside_of_the_folder_are_refused(name: str, out: Path) -> None:
    (out.parent / "precious").write_text("x")
    facts = {"size": 1, "sha256": "0" * 64, "accepted": False}
    reseal(out, files={name: facts})
    with pytest.raises(UserError, match=r"it names the file .*; expected files of its own folder"):
        load_manifest(out)
    assert not is_within(name)


@pytest.mark.parametrize("name", ["a", "deep/a", "..a", "a..b/c", ".hidden"])
def test_names_within_the_folder(name: str) -> None:
    assert is_within(name)


# -- changed on purpose ----------------------------------------------------------------------------------------------


def test_a_sidecar_may_be_changed_on_purpose(out: Path) -> None:
    before = load_manifest(out)
    (out / "chat_template.jinja").write_text("mine, and longer")
    with pytest.raises(UserError, match=r"changed on purpose: smoothquant check .*out --accept chat_template\.jinja"):
        load_manifest(out)
    manifest = accept(out, ["chat_template.jinja"])
    assert manifest == load_manifest(out)
    check_content(out, manifest)
    assert {name for name, facts in manifest.files.items() if facts.accepted} == {"chat_template.jinja"}
    assert (manifest.inputs, manifest.results) == (before.inputs, before.results)
    flip(out / "chat_template.jinja", 0)  # it was accepted as it was
    with pytest.raises(UserError, match="its content is not what was written"):
        check_content(out, manifest)


@pytest.mark.parametrize("name", ["weights.safetensors", "unknown.txt", MANIFEST, "../precious"])
def test_other_files_may_not(name: str, out: Path) -> None:
    before = (out / MANIFEST).read_bytes()
    (out.parent / "precious").write_text("x")
    (out / "unknown.txt").write_text("x")
    flip(out / "weights.safetensors", 0)
    with pytest.raises(UserError, match=r"a file that may be changed by hand: .*chat_template\.jinja"):
        accept(out, ["chat_template.jinja", name])
    assert (out / MANIFEST).read_bytes() == before
    with pytest.raises(UserError):
        check_content(out, load_manifest(out))


def test_nothing_is_accepted_by_a_damaged_manifest(out: Path) -> None:
    flip(out / MANIFEST, len((out / MANIFEST).read_bytes()) - 10)
    with pytest.raises(UserError, match="changed or damaged"):
        accept(out, ["chat_template.jinja"])


# -- what may be replaced --------------------------------------------------------------------------------------------


def unlisted(out: Path) -> None:
    (out / "deep/thesis.txt").write_text("the only copy")


def unlisted_among_ours(out: Path) -> None:
    (out / "smoothquant/thesis.txt").write_text("the only copy")


def link(out: Path) -> None:
    (out / "link").symlink_to(out.parent)


def subfolder(out: Path) -> None:
    (out / "mine/deep").mkdir(parents=True)
    (out / "mine/deep/thesis.txt").write_text("the only copy")


def lost_manifest(out: Path) -> None:
    (out / MANIFEST).unlink()


def other_manifest(out: Path) -> None:
    (out / MANIFEST).write_text(json.dumps({"name": "an app", "icons": []}))


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file": (unlisted, r"out holds deep/thesis\.txt, which this tool did not write"),
    "a file among ours": (unlisted_among_ours, r"out holds smoothquant/thesis\.txt, which this tool did not write"),
    "a link": (link, "out holds link, which this tool did not write"),
    "a subfolder": (subfolder, r"out holds mine/deep/thesis\.txt, which this tool did not write"),
    "no manifest": (lost_manifest, "out exists, and this tool did not make it"),
    "somebody else's manifest": (other_manifest, "out exists, and this tool did not make it"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_never_replaced(kind: str, out: Path) -> None:
    change, fault = FOREIGN[kind]
    assert check_replaceable(out) == {MANIFEST, *FILES}
    change(out)
    before = {path: path.lstat().st_ino for path in out.parent.rglob("*")}
    with pytest.raises(OutputError, match=fault):
        check_replaceable(out)
    with (
        pytest.raises(OutputError, match=fault),
        Workspace(out, "export test", {"model": "b"}, overwrite=True),
    ):
        raise AssertionError("it must not begin")
    assert {path: path.lstat().st_ino for path in out.parent.rglob("*")} == before


def test_a_file_that_comes_while_we_work_stays(out: Path) -> None:
    with Workspace(out, "export test", {"model": "b"}, overwrite=True) as work:
        work.path("data").write_text("new")
        unlisted(out)
        with pytest.raises(OutputError, match=r"out holds deep/thesis\.txt"):
            work.commit()
    assert load_manifest(out).inputs == {"model": "a"}
    assert (out / "deep/thesis.txt").exists()


def test_what_is_damaged_or_of_an_earlier_version_may_be_replaced(out: Path) -> None:
    """Its manifest still lists the files; what an engine keeps for itself need not be listed."""
    (out / CACHE).mkdir()
    (out / CACHE / "compiled.bin").write_text("x")
    (out / "weights.safetensors").unlink()
    flip(out / MANIFEST, -10 + len((out / MANIFEST).read_bytes()))
    assert check_replaceable(out) == {MANIFEST, f"{CACHE}compiled.bin", *set(FILES) - {"weights.safetensors"}}
    inner = read_json(out / MANIFEST)
    (out / MANIFEST).unlink()
    sizes = {name: len(content) for name, content in FILES.items()}
    write_json(out / TOP_MANIFEST, {"format": 2, "step": "export hf", "inputs": inner["inputs"], "files": sizes})
    assert TOP_MANIFEST in check_replaceable(out)
    assert is_output(out)


# -- apart from what is read -----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "models/llama").mkdir(parents=True)
    (tmp_path / "models/llama/config.json").write_text("{}")
    (tmp_path / "alias").symlink_to(tmp_path / "models")
    (tmp_path / "link").symlink_to(tmp_path / "models/llama")
    (tmp_path / "away").mkdir()
    (tmp_path / "away/out").symlink_to(tmp_path / "models/llama/new")
    return tmp_path / "models/llama"


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("models/llama", "is"),
        ("link", "is"),
        ("alias/llama", "is"),
        ("away/../models/llama", "is"),
        ("models", "holds"),
        ("alias", "holds"),
        (".", "holds"),
        ("models/llama/out", "lies inside"),
        ("models/llama/new/deep/out", "lies inside"),
        ("link/out", "lies inside"),
        ("alias/llama/out", "lies inside"),
        ("away/out", "lies inside"),
    ],
)
def test_an_output_is_apart_from_what_is_read(place: str, how: str, model: Path, tmp_path: Path) -> None:
    for source in (model, tmp_path / "link", tmp_path / "alias/llama"):
        with pytest.raises(OutputError, match=rf"--out .* {how} the model \(.*\); expected a place apart"):
            check_apart(tmp_path / place, {"the text": tmp_path / "text", "the model": source})


@pytest.mark.parametrize("place", ["out", "models/llama-2", "models/out", "away/new", "away/deep/new"])
def test_an_output_beside_what_is_read(place: str, model: Path, tmp_path: Path) -> None:
    check_apart(tmp_path / place, {"the model": model, "nothing": tmp_path / "nowhere"})


def test_a_file_is_apart_too(model: Path, tmp_path: Path) -> None:
    config = model / "config.json"
    with pytest.raises(OutputError, match=r"--report .* is the config \("):
        check_apart(tmp_path / "link/config.json", {"the config": config}, "--report")
    with pytest.raises(OutputError, match="holds the config"):
        check_apart(model, {"the config": config})
    check_apart(model / "other.json", {"the config": config})
