"""Our engines for CPUs beside those of others, on the same random Llama: prompts, and tokens behind them.

    pip install --target PACKAGES/peers-packages --no-deps onnx-ir torchao xllamacpp gguf nncf ninja pydot \\
        scikit-learn scipy tabulate pyparsing joblib threadpoolctl
    python -m tests.servers vllm -- --collect-only
    PYTHONPATH=PACKAGES/peers-packages python -m tests.benchmarks.peers [--hidden 2048 --rounds 7]
    PYTHONPATH=PACKAGES/peers-packages python -m tests.benchmarks.peers.accuracy MODEL --calibration valid.txt \\
        --text test.txt

Every engine has a process of its own; only one works at a time. Peers whose packages or
instructions are missing are left out. PyTorch in bfloat16 takes part where the processor multiplies bfloat16; compiled
it does not: inductor compiles anew for each of these shapes, minutes for one cell.

First each engine by itself computes every cell, which gives its peak of memory. A cell
that a third of this time or of its first cell says will take longer than --longest seconds is left out. Then all
are open and take turns, in cells that take less than --limit seconds; the others keep their first number, without
quartiles. Decoding goes on from round to round: round n begins 8 n tokens behind the prompt. Ratios are of times next
to each other in one round, over the FP32 graph in ONNX Runtime. --fresh opens each engine anew in each round, where the
memory does not hold all (hidden 4096). The result is saved behind every round; a cell of an engine that fails stops, is
marked, and the others go on.

Every engine has the same number of threads, genai's sessions too. Times are of the clock on the wall, but for a step of
llama.cpp: its server shows no step, so that time is its own timing, always of the tokens next to the prompt.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from exporters.export import Source
from recipes.families import open_model
from smoothquant.machine import physical_cores
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.peers.forms import PEERS, Forms, chosen, make_all, missing
from tests.benchmarks.peers.rounds import Rounds
from tests.benchmarks.peers.show import rows
from tests.benchmarks.random_llama import save_llama
from tests.benchmarks.results import keep, show


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
        folders, failed = make_all(Forms(place / "model", place, source), chosen(given.engines))
        rounds = Rounds(folders, given.threads, given.limit, given.longest, place, failed)
        rounds.alone()
        save(given, rounds)
        for number in rounds.fresh(given.rounds) if given.fresh else rounds.together(given.rounds):
            save(given, rounds)
            print(f"round {number} of {given.rounds}", file=sys.stderr)
    show(rows(facts_of(given, rounds)))


def save(given: argparse.Namespace, rounds: Rounds) -> None:
    facts = facts_of(given, rounds)
    keep(f"peers_{given.hidden}", rows(facts), facts, command="peers")


def facts_of(given: argparse.Namespace, rounds: Rounds) -> dict:
    return {
        "model": {"hidden": given.hidden, "layers": given.layers, "vocab": given.vocab},
        "threads": given.threads,
        "times": rounds.times,
        "memory": rounds.memory,
        "failed": rounds.failed,
        "failures": {cell: found for cell, found in rounds.failures.items() if found},
        "missing": missing(),
    }


if __name__ == "__main__":
    main()
