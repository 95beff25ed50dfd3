"""transformers' own class of a config.json beside our decoder, both with the same random weights.

The config is cut down (`miniature`), the weights are scaled such that attention is peaked and the epsilon of a norm
counts, since at the usual 0.02 a wrong rotary base or window would not show. transformers computes the sequence in two
chunks with its KV cache, and saves the weights. Our reader reads them, and our decoder computes the sequence as a
whole. The logits must agree to TOLERANCE of their spread (standard deviation); float32's own rounding is some 5e-6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.trust.known import TransformersClass
from recipes.trust.miniature import ORIGINAL, TOKENS, VOCABULARY, cut_down
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.checkpoint import Checkpoint
from smoothquant.errors import CheckpointError, UserError
from smoothquant.family import Family
from smoothquant.files import scratch, write_json
from smoothquant.layers import float_layer
from smoothquant.model import Model

TOLERANCE = 1e-4  # of the spread of the logits
# What transformers raises for a config that it cannot run.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
CHUNK = ORIGINAL + 6  # tokens of the first chunk: more than a window, and than the original length
GAIN = 2.0  # standard deviation of a linear's outputs, for inputs of 1
# What transformers chooses, and its plainest. In 5.23 the latter adds a Falcon's ALiBi twice; in 4.56 the former drops
# a Gemma 2's cap of the scores. A record is right if either of them says so.
ATTENTION = (None, "eager")
CORRECT = (
    "restore the config.json that came with the weights, or correct the record (recipes/README.md says what its fields "
    "mean)"
)
EMBEDDED = 0.02  # root mean square of what the first layer reads: small, so that a norm's epsilon shows


def check_agreement(model: Model, family: Family, theirs: TransformersClass) -> None:
    """Raise CheckpointError unless our decoder, by this record, gives the logits of transformers.

    family: the record that the model was opened with, its variant not yet chosen.
    """
    content, where = model.config.content, model.checkpoint.folder / "config.json"
    known = theirs.read(content)
    _check_numbers(model, known, theirs)
    for original in (ORIGINAL, 2 * TOKENS) if model.choices else (ORIGINAL,):  # LongRoPE's long factors, and its short
        _compare(cut_down(content, model.geometry, known, original), theirs, family, where)


def _compare(cut: Mapping[str, Any], theirs: TransformersClass, family: Family, where: Path) -> None:
    name, off = theirs.model.__name__, float("inf")
    for attention in ATTENTION:
        if not off <= TOLERANCE:
            off = min(off, _distance(cut, theirs, family, where, attention))
    if not off <= TOLERANCE:
        raise CheckpointError(
            f"{where}: by the family {family.name} this model computes something else than transformers' {name}: "
            f"on random weights the logits are off by {off:.1e} of their spread",
            expected=f"at most {TOLERANCE:.0e}",
            do=CORRECT,
        )


def _distance(
    cut: Mapping[str, Any], theirs: TransformersClass, family: Family, where: Path, attention: str | None
) -> float:
    name = theirs.model.__name__
    with scratch() as folder:
        expected = save_theirs(cut, theirs, folder, attention)
        try:
            found = our_logits(folder, cut, family)
        except (UserError, RuntimeError) as error:  # a RuntimeError is torch's, for shapes that do not fit
            told, expectation = (error.what, error.expected) if isinstance(error, UserError) else (str(error), "")
            raise CheckpointError(
                f"{where}: the family {family.name} does not fit what transformers' {name} saves: {told}",
                expected=expectation,
                do=CORRECT,
            ) from error
    return disagreement(found, expected)


def save_theirs(
    cut: Mapping[str, Any], theirs: TransformersClass, folder: Path, attention: str | None = None
) -> Tensor:
    """Logits (tokens, vocab) float32 by transformers, in two chunks; the weights are saved in `folder`.

    attention: which of its implementations of attention, None for the one that it chooses.
    Raises CheckpointError for a config that transformers cannot run.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = theirs.read(cut)
        try:
            chosen = {"attn_implementation": attention} if attention else {}
            model = theirs.model._from_config(config, dtype=torch.float32, **chosen).eval()
            randomize(model)
            with torch.no_grad():
                first = model(sample()[:, :CHUNK], use_cache=True)
                second = model(sample()[:, CHUNK:], past_key_values=first.past_key_values, use_cache=True)
            model.save_pretrained(folder)
        except REFUSALS as error:
            told = " ".join(str(error).split())
            raise CheckpointError(
                f"transformers' {theirs.model.__name__} cannot run with this config.json ({told})",
                expected="a config that transformers runs",
                do="restore the config.json that came with the weights",
            ) from error
    write_json(folder / "config.json", dict(cut))
    return torch.cat((first.logits, second.logits), dim=1)[0].float()


@torch.no_grad()
def our_logits(folder: Path, cut: Mapping[str, Any], family: Family) -> Tensor:
    """Logits (tokens, vocab) float32 by our decoder, of a checkpoint with this config.json."""
    checkpoint = Checkpoint(folder)
    checkpoint.config = dict(cut)
    model = Model(checkpoint, family)
    if model.choices:
        model = Model(checkpoint, family, length=TOKENS)
    ids = sample()
    hidden, positions = decoder.embed(model, ids, torch.float32), patterns(model, ids.shape[1], torch.float32)
    for index in range(model.geometry.layers):
        hidden = decoder.forward(model, float_layer(model, index), hidden, positions)
    return decoder.logits(model, hidden)[0]


def disagreement(found: Tensor, expected: Tensor) -> float:
    """Largest difference of logits over the standard deviation of the expected ones. Other shapes: infinite."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.std()).item()


def sample() -> Tensor:
    """Token ids (1, tokens) int64."""
    return torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomize(model: Any) -> None:
    """Give every parameter random values at which every part of the model has its say."""
    generator = torch.Generator().manual_seed(0)
    tables = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter in tables:
            parameter.normal_(std=EMBEDDED, generator=generator)
        elif parameter.dim() > 1:
            parameter.normal_(std=GAIN / parameter.shape[-1] ** 0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    embedded = model(sample(), output_hidden_states=True).hidden_states[0]  # multiplied by what the model multiplies it
    for table in tables:
        table.mul_(EMBEDDED / embedded.square().mean().sqrt())
    if model.get_output_embeddings().weight in tables:  # a small head: let the norm before it make up for that
        spread = model(sample()).logits.std()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not any(part.isdigit() or "embed" in part for part in name.split(".")):
                parameter.mul_((GAIN / spread).clamp(1, 100))


def _check_numbers(model: Model, known: Any, theirs: TransformersClass) -> None:
    """Raise CheckpointError where the record reads another number than transformers, before anything is cut."""
    geometry = model.geometry
    ours = {
        "hidden_size": geometry.hidden_size,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "vocab_size": geometry.vocab_size,
    }
    for key, number in ours.items():
        found = getattr(known, key, None)
        if isinstance(found, int) and found != number:
            raise CheckpointError(
                f"{model.checkpoint.folder}/config.json: {key} is {number} by the family {model.family.name}",
                expected=f"{found}, as transformers' {theirs.config.__name__} reads it",
                do="correct the record's geometry",
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and warnings of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
