"""smoothquant build TARGET: an engine out of an export. A target is a file beside this one, with NAME and add."""

from __future__ import annotations

import argparse

from recipes.cli import build_onnxruntime, build_openvino, build_tensorrt, build_tensorrt_llm

TARGETS = (build_onnxruntime, build_openvino, build_tensorrt, build_tensorrt_llm)


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    build = commands.add_parser("build", help="make an engine from an export", description="Make an engine folder.")
    names = ",".join(target.NAME for target in TARGETS)
    targets = build.add_subparsers(dest="target", metavar=f"{{{names}}}", required=True)
    for target in TARGETS:
        target.add(targets, common)
