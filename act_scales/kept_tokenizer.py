"""The tokenizer that an export keeps: what transformers makes of a model's files, in one file.

    OUT/smoothquant/tokenizer.json    in the format of the package tokenizers, which alone reads it

A model's own tokenizer.json does not say how transformers tokenizes. By the class that other files name, transformers
builds many tokenizers anew, with other special tokens around a text; some have no tokenizer.json at all. So an export
keeps what came of it, and its engines read a prompt as the calibration text was read, without transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from act_scales.tokenizer import RESTORE, Encoder, TextEncoder, has_tokenizer, load_tokenizer
from smoothquant.artifacts.manifest import Manifest
from smoothquant.errors import UserError, raise_refusal
from smoothquant.outputs import OURS
from smoothquant.packages import require
from smoothquant.reading import check_small
from smoothquant.sidecars import TOKENIZER_FILES

Functions: TypeAlias = tuple[Callable[[str, bool], list[int]], Callable[[list[int]], str], Callable[[int], str | None]]

KEPT = f"{OURS}/tokenizer.json"
PROBES = (
    "",
    " Hello ,  world . It 's  not\n\n\tit !",
    "def f(x):\n    return x**2  # naïve, ﬁne, Å",
    "日本語 und 🦙👩‍👩‍👧 \u0000\u00a0\u2581 1234567",
)


def check_has_encoder(folder: Path, manifest: Manifest) -> None:
    """Raise UserError for an output without a tokenizer. manifest: the folder's."""
    if KEPT not in manifest.files and not has_tokenizer(folder):
        raise UserError(
            f"{folder}: it has no tokenizer, so it cannot be served",
            expected="a folder made from a model with tokenizer.json",
            do="put the tokenizer's files beside the model, and make the folder again",
        )


def kept_form(folder: Path) -> str | None:
    """The content of `KEPT` for a model folder; None if it has no tokenizer, or one that only transformers runs.

    What is kept gives the ids and texts of transformers for `PROBES`, or it is not kept.
    """
    if not has_tokenizer(folder):
        return None
    try:
        theirs = load_tokenizer(folder)
        text = theirs.backend_tokenizer.to_str()
        return text if _agrees(text, theirs) else None
    except (UserError, AttributeError):  # of the first, whoever tokenizes says more; the second has Python code
        return None


def _agrees(text: str, theirs: Any) -> bool:
    """Whether what is kept is transformers' tokenizer, by `PROBES` and by special tokens within a text."""
    ids, decode, _ = _functions(text)
    for probe in (*PROBES, "a".join(map(str, theirs.all_special_tokens))):
        for special in (False, True):
            expected = theirs(probe, add_special_tokens=special)["input_ids"]
            if ids(probe, special) != expected or decode(expected) != theirs.decode(expected, skip_special_tokens=True):
                return False
    return True


def engine_encoder(folder: Path, manifest: Manifest) -> TextEncoder:
    """The encoder of an engine's prompts: by the tokenizer that its export kept, or else by transformers.

    Files of a tokenizer that were changed on purpose count, and what was kept before does not. Raises UserError for a
    tokenizer that cannot be used, MissingPackageError if transformers is needed and missing.
    """
    changed = [name for name in TOKENIZER_FILES if name in manifest.files and manifest.files[name].accepted]
    if KEPT in manifest.files and not changed:
        return TextEncoder(folder, *_read(folder / KEPT))
    why = f"its {changed[0]} was changed" if changed else f"it has no {KEPT}"
    require("transformers", f"{folder}: {why}, so transformers reads its tokenizer, and is not installed")
    return Encoder(folder)


def _read(path: Path) -> Functions:
    check_small(path)
    try:
        return _functions(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises bare exceptions
        raise_refusal(error, path)
        raise UserError(f"{path}: no usable tokenizer ({error})", do=RESTORE) from error


def _functions(text: str) -> Functions:
    """The functions of a `TextEncoder`. text: a tokenizer in the format of the package."""
    tokenizer: Any = require("tokenizers").Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def ids(text: str, special: bool) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=special).ids

    return ids, tokenizer.decode, tokenizer.id_to_token
