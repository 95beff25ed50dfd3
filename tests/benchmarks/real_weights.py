"""W8A8 forms of a model with real weights, against the float model in float32, on held-out text.

    python -m tests.benchmarks.real_weights --model FOLDER --text CALIBRATION.txt --heldout TEST.txt
    python -m tests.benchmarks.real_weights ... --rows per-token-0.6,per-tensor-auto      # these rows alone
    python -m tests.benchmarks.real_weights ... --folder LABEL=FOLDER --rows LABEL        # another tool's INT8 folder
    python -m tests.benchmarks.real_weights ... --plan LABEL=PLAN@5% --rows LABEL         # a search's plan, at a point

Everything is computed in our own W8A8 arithmetic in PyTorch, without an engine. Some forms at a time run beside the
float layers in one sweep. Their logits are compared one sequence at a time, and the results are written after every
such group. So a table can be made in pieces: `--rows` adds rows to a file that holds the same model and texts, or
replaces them.

The results lie in results/real_weights_NAME.json, where NAME is that of the model's folder: for every form the KL, the
loss and the agreeing tokens of each sequence (`real_measures`), so that the difference of any two forms can be told
with its interval. The model is no part of the repository; its fingerprint and those of both texts are in the results.

llm-compressor's folders are made by `tests.benchmarks.llm_compressor_folders`. A new form is a few lines in
`real_forms`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from act_scales.collect import collect
from act_scales.text import Text, load_text
from builders.validate.reference import check_text
from recipes.cli.ui import Ui
from recipes.families import open_model
from smoothquant import decoder
from smoothquant.errors import UserError
from smoothquant.files import check_place
from smoothquant.model import Model
from smoothquant.sweep import Progress, sweep
from tests.benchmarks.real_forms import RECIPE, Beside, Form, folder_form, plan_form, recipe_alpha, settings_of
from tests.benchmarks.real_measures import Measured, Predictions, Results, read_results, rounded
from tests.benchmarks.results import FOLDER, Row, show, store

CALIBRATE, SAMPLES, LENGTH, TOGETHER = 32, 64, 512, 8


@dataclass(frozen=True)
class Job:
    """What is measured. text: to calibrate on. heldout: to measure on. folders, plans: INT8 folders and plans by
    name. rows: names of
    forms; empty for all. together: how many forms run at a time. out: the folder of the results."""

    model: Model
    text: Text
    heldout: Text
    folders: Mapping[str, str]
    plans: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    together: int = TOGETHER
    out: Path = FOLDER

    @property
    def name(self) -> str:
        return self.model.checkpoint.folder.name

    @property
    def path(self) -> Path:
        """The file of the results."""
        return self.out / f"real_weights_{re.sub('[^a-z0-9]+', '_', self.name.lower())}.json"

    @property
    def identity(self) -> dict[str, str]:
        """The fingerprints of what is measured, and on what."""
        return {
            "model": self.model.checkpoint.fingerprint,
            "calibration": self.text.fingerprint,
            "text": self.heldout.fingerprint,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--text", required=True, metavar="FILE", help="calibration text")
    parser.add_argument("--heldout", required=True, metavar="FILE", help="text to measure on")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"held-out sequences ({SAMPLES})")
    parser.add_argument("--calibrate", type=int, default=CALIBRATE, metavar="N", help=f"calibration's ({CALIBRATE})")
    parser.add_argument("--length", type=int, default=LENGTH, metavar="N", help=f"tokens in each ({LENGTH})")
    parser.add_argument("--rows", default="", metavar="NAME,NAME", help="measure these rows alone")
    parser.add_argument("--folder", action="append", default=[], metavar="LABEL=FOLDER", help="an INT8 folder as a row")
    parser.add_argument(
        "--plan", action="append", default=[], metavar="LABEL=PLAN[@N%]", help="a search's plan as a row"
    )
    parser.add_argument("--together", type=int, default=TOGETHER, metavar="N", help=f"forms at a time ({TOGETHER})")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="where the results go")
    given = parser.parse_args()
    try:
        model = open_model(given.model)
        text, heldout = (
            load_text(source, given.model, samples, given.length).for_model(model)
            for source, samples in ((given.text, given.calibrate), (given.heldout, given.samples))
        )
        rows = tuple(filter(None, given.rows.split(",")))
        job = Job(
            model,
            text,
            heldout,
            _labelled("--folder", given.folder),
            _labelled("--plan", given.plan),
            rows,
            given.together,
            given.out,
        )
        show(rows_of(run(job, _command(given))))
    except UserError as error:
        sys.exit(str(error))


def run(job: Job, command: str) -> Results:
    """Measure the rows of a job, and write the results after every group of forms.

    command: what the results say that made them. Raises UserError for a row that there is not, for a text that cannot
    be measured on, and for single rows where the file holds results of something else.
    """
    check_text(job.model, job.heldout)
    check_place(job.path, "--out", job.out)
    settings = {setting.name: setting for setting in settings_of(job.model)}
    names = job.rows or (*settings, *job.folders, *job.plans)
    _check_rows(names, settings, job)
    found = read_results(job.path, job.identity, ",".join(job.rows))
    forms = {name: folder_form(name, Path(job.folders[name]), job.model) for name in names if name in job.folders}
    forms |= {name: plan_form(name, job.plans[name], job.model) for name in names if name in job.plans}
    ui = Ui()
    if len(forms) < len(names):
        with tempfile.TemporaryDirectory() as scratch, ui.progress("calibrate") as progress:
            scales = collect(job.model, job.text, Path(scratch) / "act_scales.safetensors", progress=progress)
        forms |= {name: settings[name].form(job.model, scales) for name in names if name in settings}
    for start in range(0, len(names), job.together):
        group = [forms[name] for name in names[start : start + job.together]]
        with ui.progress(f"rows {start + 1} to {start + len(group)} of {len(names)}") as progress:
            loss, measured = measure(job.model, job.heldout, group, progress)
        if found is None:
            lengths = tuple(map(len, job.heldout.sequences))
            found = Results(job.identity, job.name, lengths, loss, RECIPE, recipe_alpha(job.model), {})
        found = found.with_forms(measured)
        store(job.path, command, rows_of(found), found.as_details())
    assert found is not None
    return found


@torch.no_grad()
def measure(
    model: Model, text: Text, forms: Sequence[Form], progress: Progress = lambda done, total: None
) -> tuple[tuple[float, ...], dict[str, Measured]]:
    """The float model's loss for each sequence, and the measures of every form by name, from one sweep."""
    layers, sequences = model.geometry.layers, text.sequences
    beside = [Beside(model, form) for form in forms]
    total = layers + len(sequences)
    end = sweep(model, sequences, beside, progress=lambda done, _: progress(done, total))
    losses = []
    for number, ids in enumerate(sequences):
        reference = Predictions(decoder.logits(model, end.states(number)[None])[0], ids)
        losses.append(reference.loss)
        for each in beside:
            each.add(reference, end.states(number, each.form.name))
        progress(layers + number + 1, total)
    return rounded(losses), {each.form.name: each.measured for each in beside}


def rows_of(results: Results) -> list[Row]:
    """A line for each form, and its difference to the form that all are compared with."""
    return [Row(form.label, "; ".join(_words(results, form))) for form in results.forms.values()]


def _words(results: Results, form: Measured) -> Iterator[str]:
    ratio, low, high = (ratio - 1 for ratio in results.perplexity_ratio(form))
    yield f"KL {results.kl(form):.4f}, perplexity {ratio:+.2%} ({low:+.2%} to {high:+.2%})"
    yield f"top-1 {results.top1(form):.1%}"
    if form.share is not None:
        yield f"{form.share:.1%} in float"
    other = results.forms.get(results.against)
    if other is not None and other is not form:
        estimate, low, high = results.kl_difference(form, other)
        yield f"KL {estimate:+.4f} ({low:+.4f} to {high:+.4f}) to that of {results.against}"


def _command(given: argparse.Namespace) -> str:
    """The command that measures all rows anew, with names of files for their paths."""
    words = ["--model", given.model.resolve().name, "--text", Path(given.text).name]
    words += ["--heldout", Path(given.heldout).name]
    for option, default in (("samples", SAMPLES), ("calibrate", CALIBRATE), ("length", LENGTH)):
        if getattr(given, option) != default:
            words += [f"--{option}", str(getattr(given, option))]
    return " ".join(["python -m tests.benchmarks.real_weights", *words])


def _check_rows(names: Sequence[str], own: Collection[str], job: Job) -> None:
    """Raise UserError for names that are no rows, and for folders that are no rows of their own."""
    others = (*job.folders, *job.plans)
    known = (*own, *others)
    for name in names:
        if name not in known:
            raise UserError(
                f"row {name!r}", expected=f"of {', '.join(known)}", do="give a --folder or a --plan for other rows"
            )
    for name in others:
        if name in own or name not in names:
            fault = "the label of another row" if name in own else "a label that --rows does not name"
            raise UserError(f"row {name!r}: {fault}", expected="a label of its own, which --rows names")
    if job.together < 1:
        raise UserError(f"{job.together} forms together", expected="at least 1")


def _labelled(option: str, given: Sequence[str]) -> dict[str, str]:
    """Places by label."""
    found = {}
    for each in given:
        label, _, place = each.partition("=")
        if not label or not place or "," in label:
            raise UserError(f"{option} {each}", expected="LABEL=FOLDER, with a label without a comma")
        found[label] = place
    return found


if __name__ == "__main__":
    main()
