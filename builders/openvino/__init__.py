"""OpenVINO engines: `build` makes an engine folder, `OpenVinoEngine` runs it."""

from builders.openvino.build import build
from builders.openvino.engine import OpenVinoEngine

__all__ = ["OpenVinoEngine", "build"]
