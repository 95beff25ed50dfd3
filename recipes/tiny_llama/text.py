"""The text of the demonstration model: the running Python's standard library, and what of it is held out.

    stdlib, tests     training text: {path: source}, without the held-out modules and their near-duplicates
    calibration       modules that become calibration.txt   } never trained on, disjoint
    evaluation        modules that become evaluation.txt    }

Everything is decided by paths and contents alone, so one Python version always gives one corpus.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

NOT_TEXT = {"site-packages", "__pycache__", "encodings", "pydoc_data"}  # installed packages, and large tables
TESTS = {"test", "tests", "idle_test"}
HELD_OUT_BYTES = 200_000  # per held-out text: modules are added until it is reached
HELD_OUT_SIZES = range(4_000, 60_000)  # bytes of a module that may be held out: many modules rather than one
LONG_LINE = 24  # characters; shorter lines (`return self`) are shared by unrelated files
NEAR_DUPLICATE = 0.2  # share of long lines in common above which a training file is dropped


class Corpus(NamedTuple):
    stdlib: dict[str, str]
    tests: dict[str, str]
    calibration: dict[str, str]
    evaluation: dict[str, str]


def read_corpus() -> Corpus:
    stdlib, tests = read_sources()
    calibration, evaluation = hold_out(stdlib)
    held_out = calibration | evaluation
    return Corpus(
        without_near_duplicates(stdlib, held_out), without_near_duplicates(tests, held_out), calibration, evaluation
    )


def read_sources() -> tuple[dict[str, str], dict[str, str]]:
    """The standard library as {relative path: source}, sorted by path: (stdlib, its tests)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    stdlib: dict[str, str] = {}
    tests: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        parts = set(relative.parts[:-1])
        # _sysconfigdata and config-* are generated on each machine: not portable, not CPython's text
        if parts & NOT_TEXT or relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few tests of the parser are deliberately not UTF-8
            continue
        if source.strip():
            (tests if parts & TESTS else stdlib)[relative.as_posix()] = source
    return stdlib, tests


def hold_out(stdlib: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The calibration and the evaluation modules: chosen by hash of the path, so that no taste is involved."""
    order = sorted(stdlib, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    candidates = iter([path for path in order if len(stdlib[path].encode()) in HELD_OUT_SIZES])
    calibration: dict[str, str] = {}
    evaluation: dict[str, str] = {}
    for chosen in (calibration, evaluation):
        while sum(len(source.encode()) for source in chosen.values()) < HELD_OUT_BYTES:
            path = next(candidates)
            chosen[path] = stdlib[path]
    return calibration, evaluation


def long_lines(source: str) -> set[str]:
    return {line.strip() for line in source.splitlines() if len(line.strip()) >= LONG_LINE}


def without_near_duplicates(files: dict[str, str], held_out: dict[str, str]) -> dict[str, str]:
    """`files` less the held-out ones, less their own tests, less all that share many long lines with one of them."""
    held_out_lines = [long_lines(source) for source in held_out.values()]
    own_tests = {f"test_{Path(path).stem.strip('_')}.py" for path in held_out}
    kept = {}
    for path, source in files.items():
        lines = long_lines(source)
        shared = max(len(lines & other) / max(1, min(len(lines), len(other))) for other in held_out_lines)
        if path not in held_out and Path(path).name not in own_tests and shared <= NEAR_DUPLICATE:
            kept[path] = source
    return kept
