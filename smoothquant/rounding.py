"""Round the weights of a linear with error feedback: each column takes on what the columns before it got wrong.

    least over Q of  tr (W - s Q) H (W - s Q)^T          H = E x x^T of the inputs, (in, in)

    U^T U = H^-1, U upper triangular; for each column j in turn:
        Q_j  =  round(W_j / s)        e = (W_j - s Q_j) / U_jj        W_k -= e U_jk  for the columns k behind j

The method is GPTQ (Frantar et al., ICLR 2023, algorithm 1), here at 8 bits, with one scale per row. Columns are taken
by falling H_jj: the last ones have nobody to pass their errors to. What one column's error costs in the end is e^2, so
that 1 / U_jj^2 is the part of x_j that the columns behind it cannot make up for. U is the inverse of the triangular R
with R R^T = H, so that 1 / U_jj = R_jj.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant.quantization import QMAX, absmax, weight_scale
from smoothquant.team import Team

DAMPING = 0.01  # of the mean of the diagonal, added to it: a Hessian of few tokens has no inverse
BLOCK, STEP = 128, 16  # columns after which all others are made up to date; columns after which those of the block are
PANEL = 256  # columns of a Hessian that are summed at a time


class Hessian:
    """The second moments of a linear's input, E x x^T, in diagonal blocks of at most `width` channels.

    moments: sums of x x^T, a block each, from the first channels on; of a block, that is symmetric, the lower half
    counts. Each product is float32 and the sums are float64, so that their order does not show. tokens: how many were
    summed. device: where they are summed.
    """

    def __init__(self, channels: int, width: int | None = None, device: str = "cpu") -> None:
        self.parts = [
            slice(at, min(at + (width or channels), channels)) for at in range(0, channels, width or channels)
        ]
        sizes = [part.stop - part.start for part in self.parts]
        self.moments = [torch.zeros(size, size, dtype=torch.float64, device=device) for size in sizes]
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count tokens. x: float32 (tokens, in)."""
        self.tokens += len(x)
        for part, moment in zip(self.parts, self.moments, strict=True):
            mine = x[:, part]
            for start in range(0, len(moment), PANEL):
                moment[start:, start : start + PANEL] += mine[:, start:].T @ mine[:, start : start + PANEL]

    def merge(self, team: Team) -> None:
        """Count the tokens of all ranks."""
        self.moments = [team.total_of(moment) for moment in self.moments]
        self.tokens = sum(team.gathered(self.tokens))

    def to(self, device: str) -> None:
        """Move the sums to a device."""
        self.moments = [moment.to(device) for moment in self.moments]

    def scaled(self, scale: Tensor, noise: float) -> list[Tensor]:
        """The blocks for the input x / scale, rounded. scale: (in,). noise: mean square of rounding's error."""
        found = []
        for part, moment in zip(self.parts, self.moments, strict=True):
            lower = moment.float()
            block = (lower.tril() + lower.tril(-1).T) / max(self.tokens, 1) / scale[part] / scale[part][:, None]
            block.diagonal().add_(noise)
            found.append(block)
        return found

    def feedback(self, scale: Tensor, steps: Tensor) -> Feedback:
        """Rounding by the moments of the input x / scale, rounded. scale: (in,). steps: those of the rounding, of each
        token or of all."""
        return Feedback(self.scaled(scale, (steps.square().mean() / 12).item()))

    @property
    def mean_square(self) -> Tensor:
        """E x_j^2 of each channel, (in,)."""
        return torch.cat([moment.diagonal().float() for moment in self.moments]) / max(self.tokens, 1)

    @property
    def left_over(self) -> Tensor:
        """The mean square of each channel that the channels rounded after it cannot make up for, (in,)."""
        return left_over(self.scaled(torch.ones_like(self.mean_square), 0.0))

    @property
    def unforetold(self) -> Tensor:
        """The share of each channel's mean square that the channels rounded after it cannot make up for, (in,).

        It is that of other tokens, (n + p) / (n - p) times that of the n tokens that were counted, with p channels, if
        these are normal.
        """
        beyond = [(self.tokens + len(block)) / max(self.tokens - len(block), 1) for block in self.moments]
        rates = torch.cat([torch.full((len(block),), rate) for block, rate in zip(self.moments, beyond, strict=True)])
        return (self.left_over / self.mean_square.clamp_min(1e-30) * rates).clamp_max(1)


def left_over(blocks: list[Tensor]) -> Tensor:
    """The part of each channel's mean square that the channels rounded after it cannot make up for, (in,).

    Damping counts into it, as it does where weights are rounded.
    """
    found = []
    for block in blocks:
        order, root = _root(block)
        part = torch.empty_like(root.diagonal())
        part[order] = root.diagonal().square()
        found.append(part * (block.diagonal() > 0))
    return torch.cat(found)


class Feedback:
    """Rounding by one Hessian, which is factored once for all rows. blocks: of the Hessian, float32, of in channels
    together."""

    def __init__(self, blocks: list[Tensor]) -> None:
        self._factors = [_factor(block) for block in blocks]

    def round(self, weight: Tensor, weight_scale: Tensor) -> Tensor:
        """Some rows of the weight as int8 (rows, in) in [-127, 127]. weight: float32 (rows, in). weight_scale: float32
        (rows,)."""
        parts = weight.split([len(order) for order, _ in self._factors], dim=1)
        rounded = [
            _round_block(part, weight_scale, order, upper)
            for part, (order, upper) in zip(parts, self._factors, strict=True)
        ]
        return torch.cat(rounded, dim=1)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows of the weight, as `quantization.quantize_weight` gives them: int8 (rows, in), and their
        weight_scale, float32 (rows,). weight: float32 (rows, in)."""
        scale = weight_scale(absmax(weight, dim=1))
        return self.round(weight, scale), scale


def _round_block(weight: Tensor, scale: Tensor, order: Tensor, upper: Tensor) -> Tensor:
    left = (weight / scale[:, None])[:, order].T.contiguous()  # in steps; a column of the weight is a row here
    rounded, errors = torch.empty_like(left), left.new_empty(BLOCK, left.shape[1])
    columns, integers, wrong = left.unbind(), rounded.unbind(), errors.unbind()
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        for first in range(start, end, STEP):
            last = min(first + STEP, end)
            for j in range(first, last):
                torch.round(columns[j], out=integers[j]).clamp_(-QMAX, QMAX)
                error = torch.sub(columns[j], integers[j], out=wrong[j - start])
                left[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
            left[last:end].addmm_(upper[first:last, last:end].T, errors[first - start : last - start], alpha=-1)
        left[end:].addmm_(upper[start:end, end:].T, errors[: end - start], alpha=-1)
    found = torch.empty_like(weight, dtype=torch.int8)
    found[:, order] = rounded.T.to(torch.int8)
    return found


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the columns, int64 (in,), and U for columns in that order, (in, in), each row over its U_jj."""
    order, root = _root(hessian)
    return order, _inverse(root) * root.diagonal()[:, None]


def _root(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the columns, int64 (in,), and R for columns in that order, (in, in), of a damped Hessian. A channel
    of zeros gets 1 instead."""
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True)
    damping = DAMPING * diagonal.mean().clamp_min(1e-30)
    backward = order.flip(0)  # the lower triangle of this order is the upper one of the other
    ordered = hessian[backward][:, backward]
    diagonal = ordered.diagonal()
    diagonal.copy_(torch.where(diagonal > 0, diagonal + damping, 1))
    return order, torch.linalg.cholesky(ordered).flip(0, 1)


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by its quarters: products are quicker than a solution by columns."""
    size = len(upper)
    if size <= BLOCK:
        return torch.linalg.solve_triangular(upper, torch.eye(size, device=upper.device), upper=True)
    first, last = slice(size // 2), slice(size // 2, size)
    found = torch.zeros_like(upper)
    found[first, first], found[last, last] = _inverse(upper[first, first]), _inverse(upper[last, last])
    found[first, last] = -(found[first, first] @ upper[first, last] @ found[last, last])
    return found
