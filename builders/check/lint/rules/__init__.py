"""The rules, one table for each matter. A rule is a generator of (node, what, do); its docstring opens with the form
that it matches. What TensorRT does about it was measured with its parser and compiler, and is measured again by the
tests (tests/builders/check/lint/test_rules.py)."""

from builders.check.lint.rule import Rule
from builders.check.lint.rules import files, operators, products, quantization

RULES: tuple[Rule, ...] = (
    *files.BOOK.rules,
    *operators.BOOK.rules,
    *quantization.BOOK.rules,
    *products.BOOK.rules,
)
