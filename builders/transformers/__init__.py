"""Run Hugging Face folders as engines, in transformers."""

from builders.transformers.engine import OLDEST, TransformersEngine

__all__ = ["OLDEST", "TransformersEngine"]
