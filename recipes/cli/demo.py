"""smoothquant demo: the whole way on the bundled model, in a minute or two."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recipes.cli import options, validate
from recipes.cli.ui import Ui

if TYPE_CHECKING:
    from pathlib import Path

    from builders.engine.speed import Speed


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "demo",
        parents=[common],
        help="the whole way on a small bundled model",
        description="Calibrate, smooth, quantize, export, build, validate and time the bundled model (a 4 M parameter "
        "Llama with injected outlier channels), naively and with SmoothQuant. Takes a minute or two on two cores.",
    )
    command.add_argument(
        "--out", default="smoothquant-demo", metavar="DIR", help="folder to make (default ./smoothquant-demo)"
    )
    options.add_overwrite(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from pathlib import Path

    from recipes import demo

    found = demo.demonstrate(Path(arguments.out), ui.progress, overwrite=arguments.overwrite)
    header = ("W8A8 engines", "perplexity", "to FP16", "KL to FP16", "top-1", "MB", "prefill", "decode")
    base = found.speeds[demo.FLOAT]
    reference = found.validations[0].metrics.reference_perplexity
    model_size = _megabytes(demo.tiny_llama.PATH / "model.safetensors")
    rows = [("FP16, the model", f"{reference:.2f}", "", "0", "100 %", model_size, "", "")]
    float_size = _megabytes(found.folders[demo.FLOAT] / "model.onnx.data")
    rows.append((demo.FLOAT, "", "", "", "", float_size, "1.00x", "1.00x"))
    for validation in found.validations:
        metrics, folder = validation.metrics, found.folders[validation.label]
        rows.append(
            (
                validation.label,
                f"{metrics.perplexity:.2f}",
                f"{metrics.perplexity_ratio - 1:+.2%}",
                f"{metrics.kl_mean:.4f}",
                f"{metrics.top1:.1%}",
                _megabytes(folder / "model.onnx.data"),
                *_ratios(base, found.speeds[validation.label]),
            )
        )
    real = _ratios(found.real[demo.FLOAT], found.real[demo.BEST])
    caption = (
        "prefill (256 tokens), decode: times the speed of the FP32 ONNX engine. The bundled model is too small to be\n"
        "bound by its matrix products; two decoder layers of hidden size 2048, timed beside it:\n"
        f"    prefill {real[0]}, decode {real[1]}\n"
    )
    ui.table("The bundled model on held-out text, in ONNX Runtime", header, rows, caption)
    best = next(validation for validation in found.validations if validation.label == demo.BEST)
    for check in best.checks:
        ui.say(f"{best.label}: {check.sentence}")
    ui.say(f"report  {found.report.resolve()}")
    ui.say(f'next    smoothquant generate {found.folders[demo.BEST]} "def main():"')
    ui.result(
        {
            "validations": [validate.summary(validation) for validation in found.validations],
            "seconds": found.speeds_as_dict(),
            "engine": str(found.folders[demo.BEST]),
            "report": str(found.report),
        }
    )
    validate.raise_if_missed(found.validations)


def _ratios(base: Speed, speed: Speed) -> tuple[str, str]:
    prefill, decode = base.over(speed)
    return f"{prefill:.2f}x", f"{decode:.2f}x"


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f}"
