"""Our engines for CPUs beside those of others, on the same random Llama: prompts, and tokens behind them.

    pip install --target PACKAGES/peers-packages --no-deps onnx-ir torchao xllamacpp gguf nncf ninja pydot \\
        scikit-learn scipy tabulate pyparsing joblib threadpoolctl
    python -m tests.servers vllm -- --collect-only
    PYTHONPATH=PACKAGES/peers-packages python -m tests.benchmarks.peers [--hidden 2048 --rounds 7]
    PYTHONPATH=PACKAGES/peers-packages python -m tests.benchmarks.peers.accuracy MODEL --calibration valid.txt \\
        --text test.txt

Every engine has a process of its own and the same number of threads; only one works at a time. Peers whose packages or
instructions are missing are left out. PyTorch in bfloat16 takes part where the processor multiplies bfloat16; compiled
it does not: inductor compiles anew for each of these shapes, minutes for one cell.

First each engine by itself computes every cell, which gives its peak of memory. A cell
that a third of this time or of its first cell says will take longer than --longest seconds is left out. Then all
are open and take turns, in cells that take less than --limit seconds; the others keep their first number, without
quartiles. Decoding goes on from round to round: round n begins 8 n tokens behind the prompt. Ratios are of times next
to each other in one round, over the FP32 graph in ONNX Runtime. --fresh opens each engine anew in each round, where the
memory does not hold all (hidden 4096).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from exporters.export import Source
from recipes.families import open_model
from smoothquant.machine import physical_cores
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.peers.forms import BASE, PEERS, Forms, PeerForm, chosen
from tests.benchmarks.peers.process import PeerProcess
from tests.benchmarks.peers.show import rows
from tests.benchmarks.random_llama import save_llama
from tests.benchmarks.results import publish

STEPS = 8
CASES = {"prefill 256": (256, 0), "prefill 1024": (1024, 0), "decode behind 512": (512, STEPS)}
BATCHES = (1, 4, 16)
CELLS = {
    f"{case}, batch {batch}": (prompt, batch, steps) for batch in BATCHES for case, (prompt, steps) in CASES.items()
}
Times = dict[str, dict[str, list[float]]]  # cell -> engine -> seconds, the first alone and one of each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--limit", type=float, default=2.0, help="seconds of a cell that is measured in every round")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds of a cell that is measured at all")
    parser.add_argument("--engines", nargs="+", metavar="NAME", choices=[peer.name for peer in PEERS])
    parser.add_argument("--fresh", action="store_true", help="open each engine anew in each round")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        save_llama(place / "model", given.hidden, given.layers, given.vocab)
        source = Source(open_model(place / "model"), SmoothingSettings(groups="none"))
        forms = Forms(place / "model", place, source)
        folders, failed = make_all(forms, chosen(given.engines))
        alone = {peer: first(peer, folder, given, place, failed) for peer, folder in folders.items()}
        alone = {peer: found for peer, found in alone.items() if found}
        times = {cell: {peer.name: [f[cell][0]] for peer, f in alone.items() if cell in f} for cell in CELLS}
        opened = {peer: folders[peer] for peer in alone}
        if given.fresh:
            for turn in range(given.rounds):
                for peer, folder in opened.items():
                    with PeerProcess(peer, folder, given.threads, place / "log") as process:
                        take(times, {peer: process}, given.limit)
                told(turn, given.rounds)
        else:
            with ExitStack() as stack:
                processes = {
                    peer: stack.enter_context(PeerProcess(peer, folder, given.threads, place / "log"))
                    for peer, folder in opened.items()
                }
                take({cell: {n: list(t) for n, t in by.items()} for cell, by in times.items()}, processes, given.limit)
                for turn in range(given.rounds):
                    take(times, processes, given.limit)
                    told(turn, given.rounds)
    facts = {
        "model": {"hidden": given.hidden, "layers": given.layers, "vocab": given.vocab},
        "threads": given.threads,
        "times": times,
        "memory": {
            peer.name: dict(zip(("batch 1", "all"), found["peak"], strict=True)) for peer, found in alone.items()
        },
        "failed": failed,
        "missing": {peer.name: peer.missing for peer in PEERS if peer.missing},
    }
    publish(f"peers_{given.hidden}", rows(facts), facts, command="peers")


def make_all(forms: Forms, peers: list[PeerForm]) -> tuple[dict[PeerForm, Path], dict[str, str]]:
    """The folder of each engine, and why others have none, by name."""
    folders, failed = {}, {}
    for peer in peers:
        try:
            folders[peer] = peer.make(forms, forms.folder(peer.name))
        except Exception as error:  # of any tool: the others are measured all the same
            if peer.name == BASE:
                raise
            failed[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"left out: {peer.name}: {failed[peer.name]}", file=sys.stderr)
    return folders, failed


def first(
    peer: PeerForm, folder: Path, given: argparse.Namespace, place: Path, failed: dict[str, str]
) -> dict[str, list[float]]:
    """One number of each cell, of an engine by itself, and under "peak" the peak of memory before batches and after
    them. An engine that fails has none."""
    found: dict[str, list[float]] = {}
    try:
        with PeerProcess(peer, folder, given.threads, place / "log") as process:
            process.seconds(32, 1, 0)  # opens what opens late
            peaks = [process.peak]
            for cell, (prompt, batch, steps) in CELLS.items():
                one = found.get(cell.replace(f"batch {batch}", "batch 1"), [0.0])[0]
                reading = found.get("prefill 1024, batch 1", [0.0])[0] * batch * (prompt / 1024)
                if batch > 1 and max(one, reading) > given.longest:
                    continue
                spent = process.seconds(prompt, batch, steps)
                if batch == 1 or spent > 1.5 * one * batch:  # something was made ready on the way
                    spent = process.seconds(prompt, batch, steps)
                found[cell] = [spent]
                if batch == 1:
                    peaks = [process.peak]
            found["peak"] = [*peaks, process.peak]
    except RuntimeError as error:
        failed[peer.name] = str(error)
        print(f"stopped: {error}", file=sys.stderr)
        found.setdefault("peak", [0, 0])
    print(f"alone: {peer.name}: {found}", file=sys.stderr)
    return found if any(cell in found for cell in CELLS) else {}


def take(times: Times, processes: dict[PeerForm, PeerProcess], limit: float) -> None:
    """Measure the short cells once more, engines in turn. What a cell costs tells its first number."""
    for cell, (prompt, batch, steps) in CELLS.items():
        for peer, process in processes.items():
            before = times[cell].get(peer.name)
            reading = times.get("prefill 256, batch 1", {}).get(peer.name, [0.0])[0] * batch * prompt / 256
            cost = (
                0.0 if before is None else reading if peer.kind == "llama.cpp" and steps else before[0] * (steps or 1)
            )
            if before is not None and cost <= limit:
                before.append(process.seconds(prompt, batch, steps))


def told(turn: int, rounds: int) -> None:
    print(f"round {turn + 1} of {rounds}", file=sys.stderr)


if __name__ == "__main__":
    main()
