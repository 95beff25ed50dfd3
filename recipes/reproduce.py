"""The published result of a recipe, measured again on real weights.

    text          WikiText-2's test split, its lines joined by blank ones, tokenized as one document, cut every 2048
                  tokens; the rest is dropped
    smoothing     norm -> linears, by the released code's formula, with the recipe's alpha
    quantization  weights per output channel, activations per token

As the SmoothQuant authors' ppl_eval.py does (https://github.com/mit-han-lab/smoothquant), with these differences: it
computes in bfloat16, we in float32; it quantizes the outputs of q, k and v, too, and Mixtral's router, we do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from act_scales.store import load_act_scales
from act_scales.text import Text, load_document
from builders.validate.perplexity import Perplexities, perplexities
from recipes.recipe import Recipe
from smoothquant.artifacts.record import as_json
from smoothquant.device import choose_device
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.outputs import load_manifest
from smoothquant.workspace import Workspace

WIKITEXT2 = "hf:Salesforce/wikitext/wikitext-2-raw-v1:test"
DIFFERENCES = (
    "Published: by the authors' ppl_eval.py in bfloat16, which also quantizes the outputs of q, k, v and Mixtral's "
    "router. Measured: here, in float32, those in float."
)


@dataclass(frozen=True)
class ReproducedPerplexities:
    """What the manifest says was measured."""

    perplexities: Perplexities


@dataclass(frozen=True)
class Reproduction:
    """A recipe's published perplexities (None where there are none) and the measured ones."""

    recipe: Recipe
    measured: Perplexities
    sequences: int

    def as_dict(self) -> dict:
        published = self.recipe.published
        return {
            "recipe": self.recipe.name,
            "model": self.recipe.model,
            "alpha": self.recipe.alpha,
            "published": asdict(published) if published else None,
            "measured": asdict(self.measured),
            "sequences": self.sequences,
            "differences": DIFFERENCES,
        }


def whole_blocks(source: str, model: Model, samples: int, length: int, field: str | None = None) -> Text:
    """The text as the published numbers take it. Raises UserError if it is shorter than one block."""
    text = load_document(source, model.checkpoint.folder, samples, length, field).for_model(model)
    whole = tuple(sequence for sequence in text.sequences if len(sequence) == length)
    if not whole:
        raise UserError(
            f"{source}: {text.tokens} tokens", expected=f"at least {length}", do="give a longer text, or --length"
        )
    return replace(text, sequences=whole)


def reproduce(
    recipe: Recipe,
    model: Model,
    act_scales: str | Path,
    text: Text,
    out: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reproduction:
    """Measure a recipe's perplexities; the folder `out` keeps the result, and the state of an interrupted run.

    Raises ActScalesError for act scales of another model, OutputError for an `out` made from other inputs.
    """
    device, scales = choose_device(device), load_act_scales(act_scales).for_model(model)
    settings = recipe.settings(model, groups="paper")
    inputs = {
        "model": model.checkpoint.fingerprint,
        "act_scales": scales.fingerprint,
        "text": text.fingerprint,
        "smoothing": settings.as_dict(),
    }
    with Workspace(out, "reproduce", inputs, overwrite=overwrite) as work:
        if not work.finished:
            found = perplexities(model, text, scales.input_absmax, settings, work, device=device, progress=progress)
            work.commit(as_json(ReproducedPerplexities(found)))
    return Reproduction(recipe, load_manifest(out).results_as(ReproducedPerplexities).perplexities, len(text.sequences))
