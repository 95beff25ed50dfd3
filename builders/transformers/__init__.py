"""Hugging Face folders as engines, run by transformers."""

from builders.transformers.engine import OLDEST, TransformersEngine

__all__ = ["OLDEST", "TransformersEngine"]
