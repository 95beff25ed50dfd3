"""The bundled demonstration model: a small Llama with openly injected outlier channels. See README.md."""

from pathlib import Path

PATH = Path(__file__).resolve().parent
CALIBRATION_TEXT = PATH / "calibration.txt"
EVALUATION_TEXT = PATH / "evaluation.txt"
