"""The tiers of docker/tensorrt/gpu_check.sh: each a process of its own, stopped after a limit, none for another's sake.

torch      PyTorch alone beside the CPU (`torch_alone`); no TensorRT, no network
forms      TensorRT's engines of every form of the bundled model, beside ONNX Runtime
overflow   one product with float32 scales and with float16 ones
speed      INT8 against FP16 on a random Llama, and whether its products are INT8 kernels
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.outcomes import FAILED, FILE, NOT_RUN, OK, Outcome, read

SECONDS = 480  # the limit of a tier


@dataclass(frozen=True)
class Tier:
    """A process. words: of Python's command line. on_cpu: whether it can stand in for itself on a CPU (--device)."""

    words: tuple[str, ...]
    on_cpu: bool = False


def _tests(chosen: str) -> Tier:
    return Tier(("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen, "tests/gpu"))


TIERS: Mapping[str, Tier] = {
    "torch": Tier(("-m", "tests.gpu.torch_alone"), on_cpu=True),
    "forms": _tests("engine or output"),
    "overflow": _tests("overflow"),
    "speed": Tier(("-m", "tests.benchmarks.tensorrt_speed", "--layers", "2", "--repeats", "5")),
}


def run(
    tiers: Mapping[str, Tier],
    device: str,
    *,
    seconds: float = SECONDS,
    say: Callable[[str], object] = print,
) -> list[tuple[str, Outcome]]:
    """Run tiers one after the other. Returns every outcome with its tier; a tier without any has one that says why.

    device: "cuda" or "cpu", where only those run that can. seconds: the limit of each.
    """
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, tier in tiers.items():
            say(f"== {name}: at most {seconds:g} s")
            if device == "cpu" and not tier.on_cpu:
                rows.append((name, Outcome("the tier", NOT_RUN, "it needs a GPU")))
                continue
            place = Path(scratch, name)
            words = [*tier.words, *(("--device", device) if tier.on_cpu else ())]
            end = _limited([sys.executable, *words], {FILE: str(place)}, seconds)
            found = read(place)
            if end == "stopped":
                found.append(Outcome("the tier", FAILED, f"stopped after {seconds:g} s"))
            elif end != "0" and not any(outcome.verdict == FAILED for outcome in found):
                found.append(Outcome("the tier", FAILED, f"ended with status {end}; see above"))
            rows += [(name, outcome) for outcome in found or [Outcome("the tier", OK, "nothing to tell")]]
    return rows


def _limited(command: Sequence[str], variables: Mapping[str, str], seconds: float) -> str:
    """Run a command in a process group of its own. Returns its status, or "stopped" where the limit ended it."""
    process = subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True)
    try:
        return str(process.wait(seconds))
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
