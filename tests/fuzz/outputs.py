"""What we wrote, damaged: bits of any file, the manifest's JSON, the working folder of an interrupted export, `--out`.

flips       a bit, the length or the place of a file of an export: reading must refuse it
manifests   JSON of another shape, sealed again as an attacker would: a refusal or a manifest, and nothing outside read
journals    anything in a working folder: the export that goes on must end with the bytes of an undisturbed one
places      an --out that is, holds or hides somebody's files: they are there afterwards
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from random import Random

from exporters.export import Source, export
from exporters.huggingface import W8A8Writer
from smoothquant.artifacts.card import CARD
from smoothquant.artifacts.seal import KEY, sealed
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.outputs import MANIFEST, accept, check_content, check_replaceable, load_manifest
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import QuantizedLayer, SmoothedLayer
from tests.fuzz.loop import ACCEPTED, DIFFERENT, LOST, REFUSED, Outcome
from tests.fuzz.mutations import mutate
from tests.models import open_llama, save_llama

FOREIGN: dict[str, tuple[object, ...]] = {
    "files": ({"../secret.txt": {"size": 10, "sha256": ""}}, {"/etc/passwd": {"size": 1, "sha256": ""}}, [], None),
    "format": (3, 99, "4", None, True),
    "step": ("build onnxruntime", "export onnx", "rm -rf", 7),
    "unknown": (1,),
}
SECRET = b"a secret of ten"


def flips(random: Random, folder: Path) -> Outcome:
    """A file of an export is no longer what was written."""
    out = _copied("whole", folder)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != CARD)
    name = random.choice(names)
    path, content = out / name, bytearray((out / name).read_bytes())
    kind = random.choice(("flip", "flip", "flip", "cut", "grow", "swap", "zero", "remove"))
    if kind == "swap":
        other = out / random.choice(names)
        if other.read_bytes() == content:
            return Outcome(REFUSED)
        path.write_bytes(other.read_bytes())
    elif kind == "remove":
        path.unlink()
    else:
        place = random.randrange(len(content))
        if kind == "flip":
            content[place] ^= 1 << random.randrange(8)
        changed = {"cut": content[:place], "grow": content + b"\0", "zero": bytes(len(content)), "flip": content}[kind]
        path.write_bytes(changed)
    check_content(out, load_manifest(out), again=random.random() < 0.5)
    return Outcome(DIFFERENT, f"{kind} in {name} is accepted")


def manifests(random: Random, folder: Path) -> Outcome:
    """A manifest of another shape."""
    out = _copied("whole", folder)
    (folder / "secret.txt").write_bytes(SECRET)
    content = json.loads((out / MANIFEST).read_text())
    content.pop(KEY)
    done = [mutate(random, content, FOREIGN) for _ in range(random.choice((1, 1, 2)))]
    (out / MANIFEST).write_text(json.dumps(sealed(content), ensure_ascii=True))
    for use in (load_manifest, lambda out: accept(out, ["config.json"]), check_replaceable):
        try:
            use(out)
        except UserError:
            continue
    manifest = load_manifest(out)
    _ = manifest.origin, manifest.facts
    check_content(out, manifest)
    outside = [name for name in manifest.files if not (out / name).resolve().is_relative_to(out.resolve())]
    return Outcome(DIFFERENT, f"{'; '.join(done)}: reads {outside}") if outside else Outcome(ACCEPTED)


def journals(random: Random, folder: Path) -> Outcome:
    """A working folder in which something is damaged, lost or exchanged."""
    work = _copied("interrupted", folder, "out.smoothquant-work")
    paths = sorted(path for path in work.rglob("*") if path.is_file() and path.name not in ("lock", "names"))
    told = []
    for _ in range(random.choice((1, 1, 2, 3))):
        path = random.choice(paths)
        if not path.exists():
            continue
        content = bytearray(path.read_bytes())
        kind = random.choice(("flip", "cut", "zero", "remove", "exchange", "json"))
        told.append(f"{kind} {path.name}")
        if kind == "remove":
            path.unlink()
        elif kind == "exchange":
            path.write_bytes(random.choice(paths).read_bytes() if paths[0].exists() else b"")
        elif kind == "json" and path.suffix == ".json":
            try:
                fields = json.loads(content)
            except ValueError:  # damaged before
                fields = {}
            mutate(random, fields, {"next_layer": (0, 1, 3, 99, True, -1, None), "data": ({}, [], None)})
            path.write_text(json.dumps(fields))
        elif content:
            place = random.randrange(len(content))
            content[place] ^= 1 << random.randrange(8)
            path.write_bytes({"cut": content[:place], "zero": bytes(len(content))}.get(kind, bytes(content)))
    export(_source(), [W8A8Writer(folder / "out")])
    whole = _made("whole")
    for name in load_manifest(whole).files:
        if (folder / "out" / name).read_bytes() != (whole / name).read_bytes():
            return Outcome(DIFFERENT, f"{', '.join(told)}: other bytes in {name}")
    left = [path.name for path in folder.iterdir() if path.name != "out"]
    return Outcome(DIFFERENT, f"{', '.join(told)}: left over {left}") if left else Outcome(ACCEPTED)


def places(random: Random, folder: Path) -> Outcome:
    """Somebody's files lie where an export would like to write."""
    mine = {"thesis.txt": b"all my work", "notes/thesis.txt": b"more of it", "empty": b""}
    spots = ("out", "out.partial", "out.old", "out.smoothquant-work", "out.smoothquant-work/output", "out/smoothquant")
    if random.random() < 0.5:
        shutil.copytree(_made(random.choice(("whole", "other"))), folder / "out")
    home = folder / random.choice(spots)
    for name, content in mine.items():
        if random.random() < 0.7:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(content)
    if random.random() < 0.3:
        link = folder / random.choice(("out", "out.smoothquant-work"))
        if not link.exists():
            (folder / "elsewhere").mkdir()
            (folder / "elsewhere/thesis.txt").write_bytes(b"linked work")
            link.symlink_to(folder / "elsewhere")
    listed = {name for made in ("whole", "other") for name in [*load_manifest(_made(made)).files, MANIFEST]}
    ours = {folder / "out" / name for name in listed}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path not in ours}
    out = random.choice(("out", "out", "out", ".", "", "..", "out/inner", "thesis.txt", "a\0b", "x" * 300, "\ud800"))
    try:
        os.chdir(folder)
        export(_source(), [W8A8Writer(out)], overwrite=random.random() < 0.6)
        outcome = Outcome(ACCEPTED)
    except UserError as error:
        outcome = Outcome(REFUSED, str(error))
    finally:
        os.chdir("/")
    lost = [str(path.relative_to(folder)) for path, content in before.items() if not _is_there(path, content)]
    return Outcome(LOST, f"--out {out!r}: {lost}") if lost else outcome


def _is_there(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


@functools.cache
def _room() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fuzz-outputs-")


@functools.cache
def _model() -> Model:
    return open_llama(save_llama(Path(_room().name) / "model", num_hidden_layers=3))


def _source(alpha: float = 0.5) -> Source:
    import torch

    scales = {name: torch.ones(columns) for name, (_, columns) in _model().linears()}
    return Source(_model(), SmoothingSettings(alpha), scales, {"model": _model().checkpoint.fingerprint})


class _Interrupted(W8A8Writer):
    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        if layer.index == 2:
            raise KeyboardInterrupt
        super().write(layer, quantized)


@functools.cache
def _made(name: str) -> Path:
    """An export, another one, or the working folder of an interrupted one."""
    out = Path(_room().name) / name
    if name != "interrupted":
        export(_source(0.5 if name == "whole" else 0.3), [W8A8Writer(out)])
        return out
    try:
        export(_source(), [_Interrupted(out)])
    except KeyboardInterrupt:
        return out.with_name("interrupted.smoothquant-work")
    raise AssertionError("the export was not interrupted")


def _copied(name: str, folder: Path, into: str = "out") -> Path:
    shutil.copytree(_made(name), folder / into)
    return folder / into
