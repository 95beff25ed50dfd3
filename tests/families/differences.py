"""How far logits are apart, and how far they may be."""

from __future__ import annotations

from torch import Tensor

from smoothquant.model import Model

FLOAT32 = 5e-6  # float32 rounding, summed over two layers in another order: a few units of 1.2e-7
GRAPH = 2e-5  # the same with smoothing folded in, itself within 1e-5


def products_of(model: Model) -> int:
    """How many quantized products a graph has: q, k and v are one, and so are gate and up, of each expert. Where both
    branches read one norm, up is with q, k and v."""
    geometry, family = model.geometry, model.family
    branches = 3 if family.parallel and "mlp" not in family.norms else 4
    return geometry.layers * (2 + 2 * geometry.experts if geometry.experts else branches)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest logit."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def token_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Relative error of every token's logits, (batch, tokens)."""
    return (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
