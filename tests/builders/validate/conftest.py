"""Exported folders of the tiny model, and a text to validate on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from act_scales.text import Text
from exporters.export import Source, export
from exporters.huggingface import SmoothedWriter, W8A8Writer
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.models import sample_ids
from tests.writers import w8a8_writer


@pytest.fixture(scope="session")
def text() -> Text:
    """Four sequences, two of them shorter."""
    ids = sample_ids(seed=5)
    return Text((ids[0], ids[1], ids[2, :30], ids[3, :17]), "sample")


@pytest.fixture(scope="session")
def folders(llama: Model, input_absmax: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf (smoothed float), w8a8 and static (smoothed), naive (W8A8 without smoothing)."""
    root, fingerprints = tmp_path_factory.mktemp("folders"), {"model": llama.checkpoint.fingerprint}
    smoothed = Source(llama, SmoothingSettings(0.5), input_absmax, fingerprints)
    writers = [
        SmoothedWriter(root / "hf"),
        W8A8Writer(root / "w8a8"),
        w8a8_writer(root / "static", activations="per-tensor"),
    ]
    export(smoothed, writers)
    export(Source(llama, SmoothingSettings(0.5, "none"), None, fingerprints), [W8A8Writer(root / "naive")])
    return root
