"""Random Llamas for measuring speed."""

from __future__ import annotations

from pathlib import Path

from recipes.synthetic import save_random_llama


def save_llama(folder: Path, hidden: int, layers: int, vocabulary: int) -> None:
    """Write one with heads of 64 channels, four to a kv head, and an MLP 2.75 times as wide."""
    heads = hidden // 64
    save_random_llama(
        folder,
        hidden=hidden,
        intermediate=hidden * 11 // 4,
        layers=layers,
        heads=heads,
        kv_heads=heads // 4,
        vocabulary=vocabulary,
    )
