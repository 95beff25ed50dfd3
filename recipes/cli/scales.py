"""smoothquant scales {show,convert}: look into act scales, and go between their forms."""

from __future__ import annotations

import argparse

from recipes.cli import options
from recipes.cli.ui import Ui
from smoothquant.errors import OutputError, UserError


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    scales = commands.add_parser(
        "scales",
        help="look into act scales, convert them",
        description="Act scales are a safetensors file of this tool's, or the .pt form published with SmoothQuant. "
        "Every command takes either.",
    )
    kinds = scales.add_subparsers(dest="action", metavar="{show,convert}", required=True)
    show = kinds.add_parser(
        "show", parents=[common], help="ranges and outliers of every linear", description="Ranges of every linear."
    )
    show.add_argument("file", metavar="FILE", help="act scales, .safetensors or .pt")
    show.set_defaults(run=run_show)
    convert = kinds.add_parser(
        "convert",
        parents=[common],
        help="from one form to the other",
        description="Write act scales in the form that the ending of OUT names. The .pt form holds input maxima only.",
    )
    convert.add_argument("file", metavar="FILE", help="act scales, .safetensors or .pt")
    convert.add_argument("--out", required=True, metavar="OUT", help="file to write, .safetensors or .pt")
    options.add_overwrite(convert)
    convert.set_defaults(run=run_convert)


def run_show(arguments: argparse.Namespace, ui: Ui) -> None:
    from act_scales.store import load_act_scales

    scales = load_act_scales(arguments.file)
    rows, content = [], {}
    for name, absmax in scales.input_absmax.items():
        largest, median = absmax.max().item(), absmax.median().item()
        outliers = int((absmax > 20 * median).sum())
        content[name] = {"channels": len(absmax), "max": largest, "median": median, "outliers": outliers}
        rows.append((name, str(len(absmax)), f"{largest:.3g}", f"{median:.3g}", str(outliers)))
    caption = "outliers: channels above 20 times the median"
    ui.table(arguments.file, ("input of", "channels", "max |x|", "median", "outliers"), rows, caption)
    ui.result({"metadata": dict(scales.metadata), "linears": content})


def run_convert(arguments: argparse.Namespace, ui: Ui) -> None:
    from pathlib import Path

    from act_scales.store import load_act_scales

    out = Path(arguments.out)
    if out.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{out}: unknown form", expected="a name that ends in .safetensors or .pt")
    scales = load_act_scales(arguments.file)
    if out.exists() and not arguments.overwrite:
        raise OutputError(f"{out} exists", expected="a new file", do="choose another --out, or pass --overwrite")
    if out.suffix == ".pt":
        scales.save_pt(out)
    else:
        scales.save(out)
    ui.result({"out": str(out), "linears": len(scales.input_absmax)})
    ui.say(f"{out}: {len(scales.input_absmax)} linears")
