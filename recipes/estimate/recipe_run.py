"""What `smoothquant run` would make, as `whole.estimate` wants to know it."""

from __future__ import annotations

from dataclasses import replace

from act_scales.search import Wanted
from act_scales.text import Text
from recipes.estimate.sizes import Tokens
from recipes.estimate.whole import CALIBRATE, SEARCH, EstimatedRun, Export
from recipes.pipeline import Output, RecipeRun, check_run

HERE = ("onnxruntime", "openvino")  # targets whose engines are built on a CPU
BUILT = (*HERE, "tensorrt")


def of_recipe(job: RecipeRun) -> EstimatedRun:
    """The same run. Raises UserError, as the run would, for what cannot be made here. Which linears a search leaves in
    float is not known yet: its whole budget counts."""
    check_run(job)
    together: dict[str, list[Output]] = {}
    for output in job.outputs:
        together.setdefault(str(output.export(job.out).relative_to(job.out)), []).append(output)
    exports = [_export(job, label, outputs) for label, outputs in together.items()]
    [searched] = {output.searched for output in job.outputs} or {None}
    ranges = SEARCH if searched else CALIBRATE
    hessians = searched.memory if searched else Wanted.memory
    return EstimatedRun(job.model, job.out, tokens_of(job.text), tokens_of(job.heldout), exports, (ranges,), hessians)


def tokens_of(text: Text) -> Tokens:
    """A text as so many sequences of the longest one's length."""
    return Tokens(len(text.sequences), max(map(len, text.sequences)))


def _export(job: RecipeRun, label: str, outputs: list[Output]) -> Export:
    first, model = outputs[0], job.model
    budget = first.searched.budget if first.searched else 0.0
    in_float = tuple(name for name, _ in model.linears())
    least, most = (
        first.target.writer(first.export(job.out), model, replace(first.scheme, float_linears=kept))
        for kept in ((), in_float)
    )
    names = [output.target.name for output in outputs if output.target.name in BUILT]
    return Export(
        label,
        least,
        round(budget * (most.nbytes(model) - least.nbytes(model))),
        tuple(name for name in names if name in HERE),
        tuple(name for name in names if name not in HERE),
        sum(output.thresholds is not None for output in outputs),
    )
