"""Verdicts on families that are remembered: a model is compared with transformers once, not at every command.

    families/KEY.json, in the folder of `smoothquant.cache`

KEY is a hash of everything that a verdict depends on: the config.json, the versions of the packages, and the source of
the families, of the decoder and of a user's own record. Only agreement is remembered. A place that cannot be read or
written is none: the check is made again, every time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import recipes
import smoothquant
from smoothquant import cache
from smoothquant.files import make_folder, write_json
from smoothquant.outputs import versions
from smoothquant.reading import read_json

PACKAGES = ("python", "torch", "transformers")  # whose versions a verdict depends on


@dataclass(frozen=True)
class Verdict:
    """The verdict on one config.json and one record. path: of the file that remembers it."""

    path: Path

    @classmethod
    def of(cls, config: Mapping, source: Path | None) -> Verdict:
        """The verdict on this config.json. source: the file of a user's own family record."""
        here = versions()
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(json.dumps({name: here.get(name) for name in PACKAGES}).encode())
        for file in _sources(source):
            digest.update(file.name.encode() + file.read_bytes())
        return cls(cache.place("families") / f"{digest.hexdigest()[:32]}.json")

    @property
    def is_remembered(self) -> bool:
        """Whether transformers agreed before."""
        try:
            return read_json(self.path).get("agrees") is True
        except OSError:  # a cache of somebody else's
            return False

    def remember(self, family: str) -> None:
        """Note that transformers agrees. family: the record's name, for whoever opens the file."""
        try:
            make_folder(self.path.parent)
            write_json(self.path, {"agrees": True, "family": family, "versions": versions()})
        except OSError:
            pass  # a read-only home: the next command checks again


def _sources(own: Path | None) -> Iterator[Path]:
    """The files that say what a family computes."""
    for package in (smoothquant, recipes):
        yield from sorted(Path(package.__path__[0]).glob("*.py"))
    yield from sorted((Path(recipes.__path__[0]) / "trust").glob("*.py"))
    if own is not None:
        yield own
