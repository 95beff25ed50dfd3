"""smoothquant compare: two engines or folders side by side on one text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli import options
from recipes.cli.ui import Ui
from smoothquant.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from act_scales.text import Text
    from builders.validate.side_by_side import Runner, SideBySide

CAPTION = (
    "KL: from the first to the second, nats per token; back: the other way. clear: top-1 agreement without ambiguous "
    "tokens, whose two best logits of the first lie closer than the 99th percentile of the logits' distance"
)


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "compare",
        parents=[common],
        help="two engines or folders side by side on one text",
        description="Run two engines or folders on one text, and compare their logits with each other: the perplexity "
        "of each, KL both ways, top-1 agreement. The float model is not needed; it may be one of the two. Hugging Face "
        "folders run layer by layer, INT8 ones in this tool's own W8A8 arithmetic. The text is tokenized by the "
        "tokenizer in A, or in B if A has none. An interrupted comparison begins again.",
    )
    command.add_argument(
        "engines",
        metavar=("A", "B"),
        nargs=2,
        help="what smoothquant validate takes; or a float model's folder",
    )
    options.add_text(command, samples=32, length=512)
    options.add_device(command)
    options.add_family(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from pathlib import Path

    from builders.validate.side_by_side import check_sizes, compare_runners
    from smoothquant.device import choose_device

    device = choose_device(arguments.device)
    folders = [Path(folder) for folder in arguments.engines]
    names = [folder.resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else arguments.engines
    first, second = (_runner(arguments, label, folder, device) for label, folder in zip(labels, folders, strict=True))
    check_sizes(first, second)
    if first.model and second.model and first.model != second.model:
        ui.warn(f"{first.label} is made from model {first.model}, {second.label} from {second.model}")
    text = _text(arguments, ui, folders)
    with ui.progress("compare") as progress:
        found = compare_runners(first, second, text, progress)
    _show(ui, found, text)
    told = {"text": text.source, "text_fingerprint": text.fingerprint, "sequence_start": text.sequence_start}
    ui.result(told | found.as_dict())


def _runner(arguments: argparse.Namespace, label: str, folder: Path, device: str) -> Runner:
    from builders.engine.table import is_engine
    from builders.validate.int8_folder import is_int8_folder
    from builders.validate.side_by_side import EngineRunner, FolderRunner
    from recipes import families

    kinds = {"length": arguments.max_length, "trust_family": arguments.trust_family}
    if is_int8_folder(folder):
        return FolderRunner(label, families.open_int8_model(folder, arguments.family, **kinds), device)
    if is_engine(folder):
        return EngineRunner(label, folder)
    return FolderRunner(label, families.open_model(folder, arguments.family, **kinds), device)


def _text(arguments: argparse.Namespace, ui: Ui, folders: list[Path]) -> Text:
    """The text in the tokens of the first folder that has a tokenizer. Raises UserError if the other's are others."""
    from act_scales.tokenizer import Encoder, has_tokenizer

    holding = [folder for folder in folders if has_tokenizer(folder)]
    if not holding:
        raise UserError(
            f"{folders[0]} and {folders[1]}: no tokenizer in either",
            expected="tokenizer.json, or tokenizer.model, in one of them",
            do="copy the tokenizer's files from where the model came from",
        )
    text = options.read_text(arguments, arguments.text, holding[0], arguments.samples, arguments.length)
    for other in holding[1:]:
        options.check_tokens(text, Encoder(holding[0]), Encoder(other))
    for line in text.doubts:
        ui.warn(line)
    return text


def _show(ui: Ui, found: SideBySide, text: Text) -> None:
    metrics = found.metrics
    header = ("", "perplexity", "ratio", "KL", "back", "top-1", "clear", "ambiguous", "rel. error", "size")
    sizes = [f"{nbytes / 1e6:,.1f} MB" for nbytes in found.nbytes]
    second = (
        f"{metrics.perplexity:.3f}",
        f"{metrics.perplexity_ratio:.4f}",
        f"{metrics.kl_mean:.5f}",
        f"{found.kl_back:.5f}",
        f"{metrics.top1:.2%}",
        "" if metrics.top1_clear is None else f"{metrics.top1_clear:.2%}",
        f"{metrics.ambiguous:.2%}",
        f"{metrics.relative_error:.2e}",
    )
    rows = [
        (found.labels[0], f"{metrics.reference_perplexity:.3f}", *[""] * 7, sizes[0]),
        (found.labels[1], *second, sizes[1]),
    ]
    ui.table(f"{text.tokens:,} tokens of {text.source}", header, rows, CAPTION)
