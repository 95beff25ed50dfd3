"""Which engine to take on a processor, ONNX Runtime's or OpenVINO's: by its integer instructions, measured.

Both run the same ONNX graph and give the same logits, so the choice is free. The numbers are of W8A8 with a float
output head against the FP32 graph in ONNX Runtime (`tests/benchmarks/engine_speed.py`), with two cores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from smoothquant.machine import int8_flag

MEASURED: Mapping[str, str] = {  # best instructions of the processor -> the engine to take, and why
    "amx_int8": "OpenVINO is the faster for prompts of 1024 tokens (8.0 times FP32, ONNX Runtime 3.2), ONNX Runtime "
    "for 256 tokens (7.0, OpenVINO 4.8) and for decoding (4.0, OpenVINO 2.4 to 2.9)",
    "avx512_vnni": "ONNX Runtime is the faster for prompts of 256 tokens (2.5 times FP32, OpenVINO 2.2), and both are "
    "as fast in decoding (2.1, OpenVINO 2.0)",
    "avx2": "take ONNX Runtime: its integer products are exact there, and those of OpenVINO saturate at 16 bits",
}


def faster_engine(flags: Collection[str]) -> str:
    """A sentence about a processor with these features (`smoothquant.machine.cpu_flags`)."""
    best = int8_flag(flags)
    if best in MEASURED:
        return f"with {best}, {MEASURED[best]}"
    known = f"with {best}" if best else "on this processor"
    return f"{known}, nobody has measured whether ONNX Runtime or OpenVINO is the faster: build both, and try"
