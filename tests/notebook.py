"""Run a notebook without Jupyter: its code cells in order, in one namespace, in a folder that is then removed.

    python -m tests.notebook recipes/notebooks/smoothing.ipynb                    # store its outputs in it
    python -m tests.notebook recipes/notebooks/smoothing.ipynb --out other.ipynb  # or in a copy

The value of a cell's last expression is displayed as Jupyter displays it, as far as our notebooks need it: as text, and
as SVG if it has `_repr_svg_`. A cell that raises ends the run: the exit status is 1, its error is among its outputs,
and its number is on standard error.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import sys
import tempfile
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


class CellError(Exception):
    """A cell that raised. Its cause is what it raised."""


def run(notebook: dict[str, Any]) -> None:
    """Run all code cells and store their outputs in the notebook. Raises CellError."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        cell["outputs"], cell["execution_count"] = [], None
    for number, cell in enumerate(code, start=1):
        cell["execution_count"] = number
        _run_cell(cell, number, namespace)


def kinds(output: dict[str, Any]) -> list[str]:
    """The kinds of an output: the MIME types of what is displayed, or else the output's type."""
    return sorted(output.get("data", {})) or [output["output_type"]]


def _run_cell(cell: dict[str, Any], number: int, namespace: dict[str, Any]) -> None:
    said, value = io.StringIO(), None
    try:
        with redirect_stdout(said):
            value = _value("".join(cell["source"]), f"<cell {number}>", namespace)
            shown = None if value is None else _displayed(value)
    except (Exception, SystemExit) as error:
        trace = traceback.format_exc().splitlines()
        cell["outputs"].append(
            {"output_type": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": trace}
        )
        raise CellError(f"cell {number}: {type(error).__name__}: {error}") from error
    if said.getvalue():
        text = said.getvalue().splitlines(keepends=True)
        cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": text})
    if shown is not None:
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": shown}
        cell["outputs"].append(result)


def _value(source: str, name: str, namespace: dict[str, Any]) -> Any:
    """The value of the last expression of a cell; None if the cell ends with a statement."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace) if isinstance(last, ast.Expr) else None


def _displayed(value: Any) -> dict[str, list[str]]:
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_svg_"):
        data["image/svg+xml"] = value._repr_svg_().splitlines(keepends=True)
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, help="where the notebook with its outputs is written (default: NOTEBOOK)")
    arguments = parser.parse_args()
    notebook = json.loads(arguments.notebook.read_text(encoding="utf-8"))
    out, status, here = (arguments.out or arguments.notebook).resolve(), 0, Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            run(notebook)
        except CellError as error:
            traceback.print_exception(error.__cause__)
            print(error, file=sys.stderr)
            status = 1
        os.chdir(here)
    # as Jupyter writes it, so that its own saving changes no other line
    out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
