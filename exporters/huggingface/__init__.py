"""Hugging Face checkpoints: `SmoothedWriter` (float), `W8A8Writer` (compressed-tensors), `ModelOptWriter`."""

from exporters.huggingface.modelopt import ModelOptWriter
from exporters.huggingface.smoothed import SmoothedWriter
from exporters.huggingface.w8a8 import W8A8Writer

__all__ = ["ModelOptWriter", "SmoothedWriter", "W8A8Writer"]
