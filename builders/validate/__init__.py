"""Engines against the float reference of their source checkpoint, on held-out text."""

from builders.validate.reference import Reference
from builders.validate.run import validate, validate_engines
from builders.validate.thresholds import Check, Thresholds
from builders.validate.validation import Validation

__all__ = ["Check", "Reference", "Thresholds", "Validation", "validate", "validate_engines"]
