"""Whether a family is to be believed: every key of its config.json accounted for, and transformers agrees.

A family record says what a model computes. A wrong one passes every later proof, since each of them runs the same
record. So it is compared with somebody else's program before anything is built on it.

    keys.py        what of config.json may be passed over, and what is an error
    miniature.py   a config.json cut down: few layers, few heads, a small vocabulary, every kind of layer kept
    agreement.py   transformers' own class of that config, with random weights, beside our decoder
    verdicts.py    verdicts that are remembered, so that a model is checked once
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recipes.trust import agreement, keys, verdicts
from recipes.trust.known import transformers_class
from smoothquant.errors import UserError
from smoothquant.family import Family
from smoothquant.model import Model


def check_family(model: Model, family: Family, source: Path | None = None, *, trusted: bool = False) -> None:
    """Raise UserError unless `family`, the record that `model` was opened with, computes what transformers computes.

    source: the file of a user's own record. trusted: go on where transformers does not know the architecture; where it
    does, the check is made all the same. A verdict is remembered (`verdicts`), and the check then takes no time.
    """
    verdict = verdicts.Verdict.of(model.checkpoint.config, source)
    if verdict.is_remembered:
        return
    theirs = transformers_class(model.config.content)
    keys.check_keys(model.config, family, theirs, model.checkpoint.folder / "config.json")
    if theirs is None:
        if not trusted:
            raise UserError(
                f"{model.checkpoint.folder}/config.json: transformers knows neither {_named(model.config.content)}, so "
                f"that nobody can say whether the family {family.name} computes what this model computes",
                expected="an architecture of transformers (code beside the weights is never run)",
                do="compare some logits yourself, then pass --trust-family",
            )
        return
    agreement.check_agreement(model, family, theirs)
    verdict.remember(family.name)


def _named(config: Mapping) -> str:
    names = [*(config.get("architectures") or ()), f"model_type {config.get('model_type')!r}"]
    return " nor ".join(names)
