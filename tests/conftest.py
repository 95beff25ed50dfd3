"""Fixtures that every test may use; the functions behind them are in `tests/models.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: test processes share the cores
os.environ["SMOOTHQUANT_CACHE"] = str(Path(__file__).parents[1] / ".pytest_cache" / "smoothquant")  # not the user's

import pytest
import torch
from hypothesis import settings

from smoothquant.model import Model
from tests.models import TEXT, hooked_absmax, open_llama, sample_ids, save_llama

# no deadlines: the machines are noisy. On CI the same examples every time; at home new ones.
settings.register_profile("shared", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("shared")
torch.set_num_threads(1)  # tiny models are quickest on one thread; the test processes share the cores


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Model:
    return open_llama(llama_folder)


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    """Make a Llama of one's own: make_llama(seed=1, tie_word_embeddings=True) -> folder."""
    made = iter(range(1000))
    return lambda **changes: save_llama(tmp_path / f"llama-{next(made)}", **changes)


@pytest.fixture(scope="session")
def input_absmax(llama: Model) -> dict[str, torch.Tensor]:
    """Calibrated input maxima of `llama`, by the plainest means: hooks on the Hugging Face model."""
    return hooked_absmax(llama.checkpoint.folder, sample_ids())


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
