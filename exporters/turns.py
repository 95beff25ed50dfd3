"""When each tensor of a file is written: in the order of its bytes, as far as layers come one after another.

What lies before the layers is written first, what lies behind them last. So a file grows from its beginning, and its
SHA-256 is taken on the way (`smoothquant.data_file`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

Turn = int | str
BEFORE, AFTER = "before", "after"  # the turns of what is part of no layer; a layer's own is its index


def in_turn(layers: Mapping[str, int | None]) -> Mapping[Turn, list[str]]:
    """Names of tensors by their turns. layers: the layer of each tensor, None for what is part of none, in the order of
    the file."""
    turns: defaultdict[Turn, list[str]] = defaultdict(list)
    outer: Turn = BEFORE
    for name, layer in layers.items():
        if layer is None:
            turns[outer].append(name)
        else:
            turns[layer].append(name)
            outer = AFTER
    return turns
