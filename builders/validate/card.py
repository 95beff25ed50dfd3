"""Write what a validation has measured into the model card of the folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from builders.validate.validation import Validation
from smoothquant import files
from smoothquant.artifacts.card import CARD, with_measured
from smoothquant.errors import UserError
from smoothquant.files import make_folder, write_text
from smoothquant.outputs import CACHE, is_output, load_manifest
from smoothquant.reading import read_text


def note_measured(folder: str | Path, found: Validation) -> bool:
    """Write the measures of an engine into its folder's card; whether it has one that takes them.

    A card is left alone if it has no place for them any more, or if nobody may write there.
    """
    place = Path(folder)
    if not is_output(place) or CARD not in load_manifest(place).files:
        return False
    new = place / CACHE / CARD  # an interruption leaves nothing where other programs read
    try:
        before = read_text(place / CARD)
        after = with_measured(before, _table(found))
        if after is not None and after != before:
            make_folder(new.parent)
            write_text(new, after)
            files.DISK.replace(new, place / CARD)
            with suppress(OSError):  # an engine keeps something there, too
                files.DISK.remove_folder(new.parent)
    except (UserError, OSError):
        return False
    return after is not None


def _table(found: Validation) -> str:
    subject, metrics = found.subject, found.metrics
    begun = f", each sequence of which begins with {subject['sequence_start']}" if subject["sequence_start"] else ""
    clear = "" if metrics.top1_clear is None else f"{metrics.top1_clear:.2%}"
    rows = {
        "perplexity": f"{metrics.perplexity:.3f}, {metrics.reference_perplexity:.3f} for the model "
        f"({metrics.perplexity_ratio - 1:+.2%})",
        "KL to the model, nats per token": f"mean {metrics.kl_mean:.3g}, 99th percentile {metrics.kl_p99:.3g}",
        "top-1 agreement": f"{metrics.top1:.2%}",
        f"without near ties ({metrics.ambiguous:.2%} of tokens)": clear,
    }
    lines = [
        f"On {subject['tokens']:,} tokens of a text with the fingerprint {subject['text_fingerprint']}"
        f"{begun}, against {subject['reference']}:",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    return "\n".join(lines)
