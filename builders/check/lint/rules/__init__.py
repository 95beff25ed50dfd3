"""The rules of the linter, one file for each subject.

A rule is a generator of (node, what, do). Its docstring opens with the graph pattern that it matches. The behaviour of
TensorRT was measured with its parser and compiler; tests/builders/check/lint/test_rules.py measures it again.
"""

from builders.check.lint.rule import Rule
from builders.check.lint.rules import files, operators, products, quantization

RULES: tuple[Rule, ...] = (
    *files.BOOK.rules,
    *operators.BOOK.rules,
    *quantization.BOOK.rules,
    *products.BOOK.rules,
)
