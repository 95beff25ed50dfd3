"""Resolve a line for a version of Python that need not be here, with uv.

pip reads markers by the interpreter that runs it, so it cannot. The index is the one that pip is configured to use.
Sources on this disk that pip may know besides are left out: a stranger has none of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.installs.lines import ROOT, Line
from tests.lacking import lacking

PLATFORM = "x86_64-manylinux_2_35"  # Ubuntu 22.04, or later
CONSTRAINTS = ROOT / "constraints.txt"
NETWORK = re.compile(
    r"error sending request|Failed to fetch|dns error|Connection refused|timed out|Network is unreachable"
)
SETTINGS = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "cert": "SSL_CERT_FILE"}  # pip's, and uv's
Versions = dict[str, str]


class NoSolutionError(Exception):
    """What uv says of a line that cannot be installed."""


def installed() -> Versions:
    """The versions of constraints.txt by package: what somebody has who followed the README."""
    pairs = re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pairs}


def resolve(line: Line, python: str, folder: Path, have: Versions | None = None) -> Versions:
    """The versions that would be installed, by package. python: such as "3.12". have: what is there already, which is
    kept where it can be. Raises NoSolutionError if there is no solution. Skips the test where no index is reached."""
    kept = folder / "kept.txt"
    kept.write_text("".join(f"{name}=={version}\n" for name, version in (have or {}).items()), encoding="utf-8")
    options = ["--python-version", python, "--output-file", str(kept)]
    options += ["--constraints", str(CONSTRAINTS)] * line.pinned + ["--no-deps"] * line.alone
    _uv(options, line.requirements)
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", kept.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def downgraded(found: Versions, have: Versions) -> dict[str, str]:
    """The packages that would be replaced by older ones, and from what to what."""
    return {
        name: f"{have[name]} to {version}"
        for name, version in found.items()
        if name in have and Version(version) < Version(have[name])
    }


def _uv(options: Sequence[str], requirements: Sequence[str]) -> None:
    tool = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or lacking("no uv")
    command = [tool, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", sys.executable]
    done = subprocess.run(
        [*command, "--python-platform", PLATFORM, *options, "-"],
        input="\n".join(requirements),
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        if NETWORK.search(done.stderr):
            pytest.skip("no package index is reached from here")
        raise NoSolutionError(done.stderr)


@cache
def _environment() -> dict[str, str]:
    """This environment with pip's settings in uv's words."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(pip, capture_output=True, text=True, check=False).stdout
    settings = {}
    for name, value in re.findall(r"^\S*\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        remote = " ".join(one for one in value.split() if not one.startswith("file:"))
        if name in SETTINGS and remote:
            settings[SETTINGS[name]] = remote
    own = {"UV_PYTHON_DOWNLOADS": "never", "UV_INDEX_STRATEGY": "unsafe-best-match"}  # the second is what pip does
    return settings | os.environ | own
