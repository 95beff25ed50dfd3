"""smoothquant scales {list,pull,import,show,convert}: fetch, check, show and convert act scales."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.cli import options
from recipes.cli.ui import Ui
from smoothquant.errors import ActScalesError, OutputError, UserError

if TYPE_CHECKING:
    from act_scales.store import ActScales

FORMS = "act scales, .safetensors or .pt"
ON_HUB = {True: "yes", False: "gone", None: "not asked"}
NOT_PUBLISHED = "Not published: Llama 1 and 3, OPT below 1.3B, BLOOM below 176B. smoothquant calibrate measures them."


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    scales = commands.add_parser(
        "scales",
        help="fetch published act scales; check, show and convert any",
        description="Act scales are a safetensors file of this tool's, or the .pt form published with SmoothQuant. "
        "Every command takes either.",
    )
    kinds = scales.add_subparsers(dest="action", metavar="{list,pull,import,show,convert}", required=True)
    _add_list(kinds, common)
    _add_pull(kinds, common)
    _add_import(kinds, common)
    show = kinds.add_parser(
        "show", parents=[common], help="ranges and outliers of every linear", description="Ranges of every linear."
    )
    show.add_argument("file", metavar="FILE", help=FORMS)
    show.set_defaults(run=run_show)
    _add_convert(kinds, common)


def _add_list(kinds: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = kinds.add_parser(
        "list",
        parents=[common],
        help="the scales published with SmoothQuant",
        description="The act scales that the SmoothQuant authors published on the Hugging Face Hub. With a network, "
        f"the command asks the Hub which of them it still holds. {NOT_PUBLISHED}",
    )
    command.set_defaults(run=run_list)


def _add_pull(kinds: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = kinds.add_parser(
        "pull",
        parents=[common],
        help="download published scales",
        description="Download published act scales through huggingface_hub, into its cache, and write them in this "
        "tool's form. Without a network (or with HF_HUB_OFFLINE=1) the cache is used.",
    )
    command.add_argument("name", metavar="NAME", help="one of smoothquant scales list")
    command.add_argument(
        "--model", metavar="MODEL", help="check the scales against this model folder, and mark them as its own"
    )
    _add_out(command)
    command.set_defaults(run=run_pull)


def _add_import(kinds: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = kinds.add_parser(
        "import",
        parents=[common],
        help="check your own scales against a model",
        description="Check act scales from elsewhere against a model, and write them in this tool's form. Every linear "
        "must have one finite vector of the right length, and no other vector may be there. The file is marked as that "
        "model's: every later command refuses it for another model. Scales of lm_head and of routers are dropped, "
        "since these stay in float.",
    )
    command.add_argument("file", metavar="FILE", help=FORMS)
    command.add_argument(
        "--model", required=True, metavar="MODEL", help="folder of the model that the scales belong to"
    )
    _add_out(command)
    command.set_defaults(run=run_import)


def _add_convert(kinds: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = kinds.add_parser(
        "convert",
        parents=[common],
        help="write the published .pt form for other tools",
        description="Write act scales in the published .pt form, which SmoothQuant's own code and other tools read. "
        "It holds input maxima only. The other way is smoothquant scales import.",
    )
    command.add_argument("file", metavar="FILE", help=FORMS)
    command.add_argument("--out", required=True, metavar="OUT.pt", help="file to write")
    options.add_overwrite(command)
    command.set_defaults(run=run_convert)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="OUT.safetensors", help="file to write")
    options.add_family(command)
    options.add_overwrite(command)


def run_list(arguments: argparse.Namespace, ui: Ui) -> None:
    from act_scales import catalogue

    held: list[str] | None = None
    try:
        held = catalogue.files_on_hub()
    except catalogue.HubError as error:
        ui.note(f"the Hub was not asked what it still holds: {error.what}")
    rows, content = [], []
    for published in catalogue.CATALOGUE:
        there = None if held is None else published.file in held
        rows.append((published.name, published.model or "", published.family, published.file, ON_HUB[there]))
        content.append(
            {
                "name": published.name,
                "model": published.model,
                "family": published.family,
                "file": published.file,
                "on_hub": there,
            }
        )
    others = sorted(set(held or ()) - {published.file for published in catalogue.CATALOGUE})
    header = ("name", "model", "family", "file", "on the Hub")
    ui.table(f"Act scales in {catalogue.REPOSITORY}", header, rows, NOT_PUBLISHED)
    for file in others:
        ui.say(f"the Hub also holds {file} (hf download {catalogue.REPOSITORY} {file}, then smoothquant scales import)")
    ui.result({"repository": catalogue.REPOSITORY, "scales": content, "other_files": others})


def run_pull(arguments: argparse.Namespace, ui: Ui) -> None:
    from act_scales import catalogue

    published = catalogue.find(arguments.name)
    if arguments.family and not arguments.model:
        raise UserError("--family without --model", expected="a model to check the scales against")
    out = _free(arguments.out, ".safetensors", arguments.overwrite)
    model = options.open_model(arguments, arguments.model, ui) if arguments.model else None
    ui.note(f"{published.file} from {catalogue.REPOSITORY}")
    scales = catalogue.pull(published)
    if model:
        with _naming(f"{published.file} (scales of {published.model or published.name})"):
            scales = scales.stamped(model)
    scales.save(out)
    _report(ui, out, scales, f"checked against {arguments.model}" if model else "not checked (--model does that)")


def run_import(arguments: argparse.Namespace, ui: Ui) -> None:
    from act_scales.store import load_act_scales

    out = _free(arguments.out, ".safetensors", arguments.overwrite)
    scales = load_act_scales(arguments.file)
    model = options.open_model(arguments, arguments.model, ui)
    with _naming(arguments.file):
        scales = scales.stamped(model)
    scales.save(out)
    _report(ui, out, scales, f"checked against {arguments.model}")


def run_show(arguments: argparse.Namespace, ui: Ui) -> None:
    from act_scales.store import load_act_scales

    scales = load_act_scales(arguments.file)
    rows, content = [], {}
    for name, absmax in scales.input_absmax.items():
        largest, median = absmax.max().item(), absmax.median().item()
        outliers = int((absmax > 20 * median).sum())
        square = scales.input_mean_square.get(name)
        rms = None if square is None else square.mean().sqrt().item()
        content[name] = {"channels": len(absmax), "max": largest, "median": median, "outliers": outliers, "rms": rms}
        shown = "unknown" if rms is None else f"{rms:.3g}"
        rows.append((name, str(len(absmax)), f"{largest:.3g}", f"{median:.3g}", str(outliers), shown))
    caption = "outliers: channels above 20 times the median; rms: of all channels, on an ordinary token"
    ui.table(arguments.file, ("input of", "channels", "max |x|", "median", "outliers", "rms"), rows, caption)
    held = {name: reach.item() for name, reach in scales.held_absmax.items()}
    if held:
        furthest = max(held, key=lambda name: held[name])
        ui.say(f"between the linears: at most {held[furthest]:.3g}, in {furthest}")
    ui.result({"metadata": dict(scales.metadata), "linears": content, "held": held})


def run_convert(arguments: argparse.Namespace, ui: Ui) -> None:
    from act_scales.store import load_act_scales

    out = _free(arguments.out, ".pt", arguments.overwrite)
    scales = load_act_scales(arguments.file)
    scales.save_pt(out)
    _report(ui, out, scales, "input maxima, the published form")


def _free(out: str, suffix: str, overwrite: bool) -> Path:
    """`out` as a path that may be written. It is checked before anything is read or downloaded."""
    from act_scales.store import check_replaceable

    path = Path(out)
    if path.suffix != suffix:
        raise UserError(
            f"{path}: this command writes {suffix}",
            expected=f"a name that ends in {suffix}",
            do=f"for the other form: smoothquant scales {'import' if suffix == '.pt' else 'convert'}",
        )
    if os.path.lexists(path):
        check_replaceable(path)
        if not overwrite:
            raise OutputError(f"{path} exists", expected="a new file", do="choose another --out, or pass --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: no such folder {path.parent}", do="make it, or choose another --out")
    return path


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Let every error about act scales begin with the name of their file."""
    try:
        yield
    except ActScalesError as error:
        raise ActScalesError(f"{file}: {error.what}", expected=error.expected, do=error.do) from error


def _report(ui: Ui, out: Path, scales: ActScales, how: str) -> None:
    metadata = dict(scales.metadata)
    ui.result({"out": str(out), "linears": len(scales.input_absmax), "metadata": metadata})
    ui.say(f"{out}: {len(scales.input_absmax)} linears, {how}")
