"""INT8 folders that llm-compressor makes of a model, calibrated on the same tokens as our own forms.

    python -m tests.servers llm-compressor -- --collect-only       # once: makes llm-compressor's environment
    python -m tests.benchmarks.llm_compressor_folders --model FOLDER --text CALIBRATION.txt --out FOLDERS
    python -m tests.benchmarks.real_weights --model FOLDER --text CALIBRATION.txt --heldout TEST.txt \\
        --folder llm-compressor-gptq=FOLDERS/gptq --rows llm-compressor-gptq

Every folder is W8A8 with dynamic scales per token, the preset W8A8 of llm-compressor, in its default settings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from act_scales.text import load_text
from recipes.families import open_model
from smoothquant.errors import UserError
from tests.servers.environments import LLM_COMPRESSOR
from tests.servers.quantizers import ENVIRONMENT

WORKER = Path(__file__).parents[1] / "servers/llm_compressor_worker.py"
SMOOTHING = 0.8
FOLDERS = {  # name: the form in the worker, and the strength of SmoothQuant before it
    "gptq": ("gptq", SMOOTHING),
    "rounded": ("rounded", SMOOTHING),
    "rounded-unsmoothed": ("rounded", 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--text", required=True, metavar="FILE", help="calibration text")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the folders go")
    parser.add_argument("--calibrate", type=int, default=32, metavar="N", help="sequences of calibration (32)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens in each (512)")
    given = parser.parse_args()
    try:
        make(given.model, given.text, given.out, given.calibrate, given.length)
    except UserError as error:
        sys.exit(str(error))


def make(folder: Path, text: str, out: Path, samples: int, length: int) -> None:
    """Make all folders in `out`. Raises UserError where one is there already, and for what the tool cannot do."""
    if LLM_COMPRESSOR.python is None:
        raise UserError(
            "the environment of llm-compressor is not there",
            do="run python -m tests.servers llm-compressor -- --collect-only",
        )
    there = [name for name in FOLDERS if (out / name).exists()]
    if there:
        raise UserError(f"{out / there[0]} exists", expected="a new folder", do="choose another --out")
    sequences = load_text(text, folder, samples, length).for_model(open_model(folder)).sequences
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.json"
        ids.write_text(json.dumps([sequence.tolist() for sequence in sequences]))
        job = {"model": str(folder.resolve()), "ids": str(ids)}
        jobs = [
            job | {"out": str((out / name).resolve()), "form": form, "smoothing": smoothing}
            for name, (form, smoothing) in FOLDERS.items()
        ]
        found = subprocess.run(
            [str(LLM_COMPRESSOR.python), str(WORKER)],
            input=json.dumps({"jobs": jobs}),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=scratch,
            env=ENVIRONMENT | {"HOME": scratch},
        )
    for line in found.stdout.splitlines():
        if line.startswith('{"failed"'):
            raise UserError(f"llm-compressor: {json.loads(line)['failed']}")


if __name__ == "__main__":
    main()
