"""Install into a virtual environment that sees the packages of an image, and changes none of them.

    python3 docker/install.py --keep torch --keep tensorrt ENVIRONMENT pip install -c constraints.txt ".[demo]"

NVIDIA's images hold packages of the distribution, which pip cannot replace: they have no RECORD, and their Python is
marked as externally managed (PEP 668). Into an environment of its own, pip puts a newer version beside them. What is
kept has no newer version beside it: of each such package that the image has, the image's version is the constraint,
whatever a constraints file says. The image's own programs (trtllm-build) go on with the image's Python.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

IMAGES_OWN = ("PIP_CONSTRAINT", "PIP_BREAK_SYSTEM_PACKAGES", "PIP_USER", "PIP_TARGET")  # for its own Python
WHERE = """
import sys
from importlib.metadata import distribution
for name in sys.argv[2:]:
    found = distribution(name)
    print(found.version, str(found.locate_file("")).startswith(sys.argv[1]))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("environment", type=Path, help="folder to make")
    parser.add_argument("--keep", action="append", default=[], metavar="NAME", help="package that stays the image's")
    parser.add_argument("pip", nargs=argparse.REMAINDER, help="pip install ...")
    given = parser.parse_args(arguments)
    if given.pip[:2] != ["pip", "install"]:
        parser.error("the last words are pip install ...")
    environment = given.environment.absolute()
    kept = {name: found for name in given.keep if (found := _installed(name))}
    venv.create(environment, system_site_packages=True, with_pip=False, symlinks=True)
    python = environment / "bin/python"
    words = [*_without_constraints(given.pip[2:]), "-c", str(_constraints(environment, given.pip, kept))]
    variables = {name: value for name, value in os.environ.items() if name not in IMAGES_OWN}
    done = subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *words], env=variables)
    if done.returncode:
        return done.returncode
    for name, (found, beside) in zip(kept, _where(python, environment, kept), strict=True):
        if found != kept[name] or beside:
            print(f"install.py: {name} {found} would hide the image's {kept[name]}", file=sys.stderr)
            return 1
    return 0


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _constraints(environment: Path, words: Sequence[str], kept: Mapping[str, str]) -> Path:
    """Write the constraints of all files behind -c, those of kept packages replaced."""
    files = [words[place + 1] for place, word in enumerate(words) if word == "-c"]
    lines = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    names = {_plain(name) for name in kept}
    others = [line for line in lines if _plain(re.split(r"[^\w.-]", line, maxsplit=1)[0]) not in names]
    path = environment / "constraints.txt"
    ours = (f"{name}=={found}" for name, found in kept.items())
    path.write_text("\n".join([*others, *ours]) + "\n", encoding="utf-8")
    return path


def _without_constraints(words: Sequence[str]) -> list[str]:
    return [word for place, word in enumerate(words) if word != "-c" and words[place - 1 : place] != ["-c"]]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _where(python: Path, environment: Path, kept: Mapping[str, str]) -> list[tuple[str, bool]]:
    """The version of each kept package that the environment sees, and whether it lies in the environment."""
    found = subprocess.run([python, "-c", WHERE, environment, *kept], capture_output=True, text=True, check=True)
    return [(seen, beside == "True") for seen, beside in map(str.split, found.stdout.splitlines())]


if __name__ == "__main__":
    sys.exit(main())
