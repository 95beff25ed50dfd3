"""Hugging Face checkpoints: `SmoothedWriter` (float) and `W8A8Writer` (compressed-tensors)."""

from exporters.huggingface.smoothed import SmoothedWriter
from exporters.huggingface.w8a8 import W8A8Writer

__all__ = ["SmoothedWriter", "W8A8Writer"]
