"""Compare engines with the float reference of their source checkpoint, on held-out text.

`validate_engines` takes folders, a model and a text, and does everything. `read_scheme`, `Reference` and `validate` are
its parts.
"""

from builders.validate.reference import Reference
from builders.validate.run import validate, validate_engines
from builders.validate.scheme import EngineScheme, read_scheme
from builders.validate.thresholds import Check, Thresholds
from builders.validate.validation import Validation

__all__ = [
    "Check",
    "EngineScheme",
    "Reference",
    "Thresholds",
    "Validation",
    "read_scheme",
    "validate",
    "validate_engines",
]
