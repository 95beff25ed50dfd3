"""What a token costs the host in our TensorRT engine, with a context that does nothing. Needs no GPU and no TensorRT.

    python -m tests.benchmarks.tensorrt_host [--layers 32] [--tokens 512] [--rounds 7] [--before CHECKOUT]

The stand-in has the inputs and outputs of a Llama's decoder, 8 key and value heads of 128 channels in float16, and a
vocabulary of 32000. Its calls return at once, and PyTorch's work is on the CPU. So what is measured is Python and
PyTorch around the calls, not TensorRT's own work on the host. The floor is the same calls from a bare loop.
--before: a checkout of an earlier version, which takes turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

HEADS, CHANNELS, VOCABULARY, PROMPT = 8, 128, 32000, 16
HERE = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="tokens that are decoded in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--alone", action="store_true", help="measure a round and print it as JSON")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(decoded(arguments.layers, arguments.tokens)))
        return
    from tests.benchmarks.results import Row, publish

    checkouts = {"now": HERE} | ({"before": arguments.before.resolve()} if arguments.before else {})
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for number in range(arguments.rounds):
        for name in sorted(checkouts, reverse=number % 2 == 0):
            rounds[name].append(alone(checkouts[name], arguments.layers, arguments.tokens))
    rows = []
    for name, found in rounds.items():
        micros = [one["step"] * 1e6 for one in found]
        floor, calls = median(one["floor"] for one in found) * 1e6, found[0]["calls"]
        spread = f"{median(micros):.0f} us ({min(micros):.0f} to {max(micros):.0f}), {calls:.0f} calls of TensorRT"
        commit = "" if name == "now" else f" in {revision(checkouts[name])}, before it"
        bare = f"; {floor:.0f} us for the same calls from a bare loop"
        rows.append(
            Row(f"the host's work for a token, TensorRT stand-in, {arguments.layers} layers{commit}", spread + bare)
        )
    publish("tensorrt_host", rows, {"rounds": rounds})


def alone(checkout: Path, layers: int, tokens: int) -> dict[str, float]:
    """One round in a process of its own, with the package of a checkout."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--alone",
        "--layers",
        str(layers),
        "--tokens",
        str(tokens),
    ]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return json.loads(subprocess.check_output(command, env=environment, cwd=checkout, text=True))


def revision(checkout: Path) -> str:
    return subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], text=True).strip()


def decoded(layers: int, tokens: int) -> dict[str, float]:
    """step: median seconds of a token. floor: those of its calls from a bare loop. calls: their number."""
    seconds = steps(layers, tokens, Nothing())
    noting = Noting()
    steps(layers, 16, noting)
    last = next(index for index, call in enumerate(reversed(noting.calls[:-1])) if call[0] == noting.calls[-1][0])
    calls = [(getattr(Nothing(), name), words) for name, *words in noting.calls[-1 - last :]]
    return {"step": median(seconds), "floor": bare(calls), "calls": len(calls)}


def steps(layers: int, tokens: int, context: Nothing) -> list[float]:
    """The seconds of each token."""
    from builders.tensorrt.limits import Limits
    from builders.tensorrt.runtime import LoadedPlan
    from builders.tensorrt.session import CachedDecoding, Session
    from tests.builders.tensorrt import fake

    trt = sys.modules["tensorrt"] = fake.module()
    trt.Runtime = lambda log: Engine(trt, layers, context)
    session = Session(LoadedPlan(b"", "stand-in", fake.FakeGpu()), Limits(1, PROMPT + tokens, PROMPT, PROMPT, PROMPT))
    decoding = CachedDecoding(session, range(PROMPT))
    seconds = []
    for token in range(tokens):
        begin = time.perf_counter()
        decoding.step(token)
        seconds.append(time.perf_counter() - begin)
    return seconds


def bare(calls: Sequence[tuple]) -> float:
    """Median seconds of some calls, from a loop that does nothing else. calls: each a function and its arguments."""
    seconds = []
    for _ in range(200):
        begin = time.perf_counter()
        for call, words in calls:
            call(*words)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


class Nothing:
    """An execution context that does nothing."""

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        return True


class Noting(Nothing):
    """A context that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        self.calls.append(("set_input_shape", name, shape))
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls.append(("set_tensor_address", name, address))
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append(("execute_async_v3", stream))
        return True


class Engine:
    """A runtime and its engine: the inputs and outputs of a decoder. context: what it makes."""

    def __init__(self, trt: Any, layers: int, context: Nothing) -> None:
        self._trt, self._context = trt, context
        types, cache = trt.DataType, (-1, HEADS, -1, CHANNELS)
        names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
        given = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), (types.INT64, (-1, -1)))
        given |= {f"past_key_values.{name}": (types.HALF, cache) for name in names}
        made = {"logits": (types.FLOAT, (-1, -1, VOCABULARY))}
        made |= {f"present.{name}": (types.HALF, cache) for name in names}
        self._ports, self._given, self.num_io_tensors = given | made, given.keys(), len(given | made)

    def deserialize_cuda_engine(self, plan: bytes) -> Engine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return list(self._ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if name in self._given else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._ports[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._ports[name][1]

    def create_execution_context(self) -> Nothing:
        return self._context


if __name__ == "__main__":
    main()
