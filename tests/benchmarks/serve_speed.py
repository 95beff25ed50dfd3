"""`smoothquant serve` beside vLLM on the same CPU, under the load of vLLM's own generator.

    python -m tests.benchmarks.serve_speed ENGINE W8A8 [--rounds 7] [--hidden 2048 --layers 4]

ENGINE: made by `build onnxruntime --attention grouped`. W8A8: made by `export w8a8` of the same model and plan, which
vLLM serves in bfloat16 with its INT8 kernels. With --hidden, a random Llama of that size takes their place, with the
tokenizer of W8A8; its engine has an INT8 head, which a W8A8 folder cannot have.

Both servers run for the whole time and take turns; requests have random token ids and 64 new tokens each, drawn at
temperature 1, and no prompts share a beginning. The bare loop is the same work of the same engine in this process,
without a server. Needs the environment of vLLM (`tests.servers`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy

from builders.engine.generation import pick, pieces
from builders.engine.slots import ServableEngine
from builders.engine.table import open_engine
from builders.onnxruntime import build
from builders.onnxruntime.record import GROUPED
from exporters.export import Source, export
from recipes.families import open_model
from smoothquant.files import copy, scratch
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.load import server
from tests.benchmarks.random_llama import save_llama
from tests.benchmarks.results import Row, publish
from tests.servers.environments import VLLM
from tests.writers import onnx_writer, w8a8_writer

OURS, THEIRS, BARE = "smoothquant serve", "vLLM", "bare loop"
PORTS = {OURS: 18611, THEIRS: 18612}
NEW, LONGEST, BATCH = 64, 2048, 16
CELLS = [(clients, prompt) for prompt in (256, 1024) for clients in (1, 4, 16)]
LOOPS = [(clients, prompt) for clients, prompt in CELLS if prompt == 256]  # the bare loop's
WORKER = Path(__file__).with_name("load_worker.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("w8a8", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, help="of a random Llama; without it, the model that is given")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    if VLLM.python is None:
        parser.error("the environment of vLLM is missing: python -m tests.servers vllm")
    with scratch() as place:
        engine, w8a8, model, name = arguments.engine, arguments.w8a8, arguments.w8a8.name, "serve_speed"
        if arguments.hidden:
            engine, w8a8 = random_folders(place, w8a8, arguments.hidden, arguments.layers)
            model = f"{arguments.layers} layers of {arguments.hidden} channels, INT8 head"
            name = f"serve_speed_{arguments.hidden}"
        found = compared(engine, w8a8, arguments.rounds, place)
    publish(name, list(rows(model, found)), {"model": model, "runs": found}, command="serve_speed")


def random_folders(place: Path, like: Path, hidden: int, layers: int) -> tuple[Path, Path]:
    """The engine and the W8A8 folder of a random Llama. like: a folder whose tokenizer it has."""
    model = place / "model"
    save_llama(model, hidden, layers, json.loads((like / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(like / name, model / name)
    source = Source(open_model(model), SmoothingSettings(groups="none"))
    export(source, [onnx_writer(place / "onnx", lm_head="int8"), w8a8_writer(place / "w8a8")])
    build(place / "onnx", place / "engine", attention=GROUPED)
    return place / "engine", place / "w8a8"


def compared(engine: Path, w8a8: Path, rounds: int, place: Path) -> list[dict]:
    """What each run measured: its round, who ran, clients, prompt, and numbers by name."""
    ours = [sys.executable, "-m", "recipes.cli", "serve", engine, "--max-context", LONGEST]
    theirs = [VLLM.python, "-m", "vllm.entrypoints.openai.api_server", "--model", w8a8, "--dtype", "bfloat16"]
    theirs += ["--max-model-len", LONGEST, "--max-num-seqs", BATCH, "--enforce-eager", "--served-model-name", "w8a8"]
    loop = open_engine(engine)
    assert isinstance(loop, ServableEngine)
    with ExitStack() as stack:
        stack.enter_context(server([*ours, "--max-batch", BATCH, "--name", "w8a8"], PORTS[OURS], place / "ours.log"))
        stack.enter_context(server(theirs, PORTS[THEIRS], place / "theirs.log"))
        generator = stack.enter_context(Generator(w8a8))
        found: list[dict] = []
        for turn in range(rounds):
            for clients, prompt in CELLS:
                who = (OURS, THEIRS) if turn % 2 == 0 else (THEIRS, OURS)
                for name in (*who, BARE) if (clients, prompt) in LOOPS else who:
                    numbers = loop_speed(loop, clients, prompt) if name == BARE else generator(name, clients, prompt)
                    found.append({"round": turn, "server": name, "clients": clients, "prompt": prompt} | numbers)
                    print(f"\rround {turn + 1} of {rounds}: {clients} x {prompt} {name:<20}", end="", file=sys.stderr)
        print(file=sys.stderr)
    return found


def requests(clients: int) -> int:
    """The number of requests of a run."""
    return max(2, clients)


class Generator:
    """vLLM's load generator, in a process of its own. tokenizer: of the model, in its folder."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer, self._seed = tokenizer, 0  # no two runs have the same prompts, since servers remember them

    def __enter__(self) -> Generator:
        self._process = subprocess.Popen(
            [str(VLLM.python), str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def __call__(self, name: str, clients: int, prompt: int) -> dict:
        """What it measures of a server."""
        self._seed += 1
        options = {
            "backend": "openai",
            "base-url": f"http://127.0.0.1:{PORTS[name]}",
            "endpoint": "/v1/completions",
            "model": "w8a8",
            "tokenizer": self._tokenizer,
            "dataset-name": "random",
            "random-input-len": prompt,
            "random-output-len": NEW,
            "num-prompts": requests(clients),
            "max-concurrency": clients,
            "seed": self._seed,
            "percentile-metrics": "ttft,tpot",
        }
        words = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([*words, "--ignore-eos", "--disable-tqdm"]), file=self._process.stdin, flush=True)
        line = next((line for line in self._process.stdout if line.startswith("{")), "{}")
        measured = json.loads(line)
        if measured.get("completed") != requests(clients):
            raise RuntimeError(f"{name}, {clients} clients: not all requests were answered: {line}")
        return measured


def loop_speed(engine: ServableEngine, clients: int, prompt: int) -> dict:
    """Tokens per second of the work of a run: the prompts one after another, then steps of all sequences."""
    random, slots = numpy.random.default_rng(), engine.slots(BATCH, LONGEST)
    begin = time.perf_counter()
    for _ in range(requests(clients) // clients):
        newest = {}
        for _ in range(clients):
            slot = slots.open()
            for piece in pieces(random.integers(0, engine.manifest.facts.vocab_size, prompt).tolist()):
                logits = slots.append(slot, piece)
            newest[slot] = pick(logits[-1], 1.0, 1.0, random)
        for _ in range(NEW - 1):
            newest = {slot: pick(row, 1.0, 1.0, random) for slot, row in slots.step(newest).items()}
        for slot in newest:
            slots.close(slot)
    return {"output_throughput": requests(clients) * NEW / (time.perf_counter() - begin)}


def rows(model: str, found: list[dict]) -> Iterator[Row]:
    for clients, prompt in CELLS:
        runs = {name: runs_of(found, name, clients, prompt) for name in (OURS, THEIRS, BARE)}
        faster = ratios(runs[OURS], runs[THEIRS], "output_throughput")
        sooner = ratios(runs[OURS], runs[THEIRS], "median_ttft_ms")
        speeds = {name: median(run["output_throughput"] for run in runs[name]) for name in PORTS}
        first = {name: median(run["median_ttft_ms"] for run in runs[name]) for name in PORTS}
        what = f"{model}: {clients} client{'s' * (clients > 1)}, prompts of {prompt} tokens"
        yield Row(
            what,
            f"{median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f}) x vLLM's throughput: {speeds[OURS]:.1f} "
            f"against {speeds[THEIRS]:.1f} tokens per second; first token behind {median(sooner):.2f} x vLLM's time: "
            f"{first[OURS]:.0f} against {first[THEIRS]:.0f} ms",
            "throughput 1.2 x, first token 1.0 x" if clients == 1 else "1.0 x each",
        )
        if runs[BARE]:
            kept = ratios(runs[OURS], runs[BARE], "output_throughput")
            yield Row(
                f"{what}, beside the engine's bare loop",
                f"{median(kept):.2f} ({min(kept):.2f} to {max(kept):.2f}) x its throughput",
                "0.85 x",
            )


def runs_of(found: Sequence[Mapping], name: str, clients: int, prompt: int) -> list[Mapping]:
    """The runs of a server in a cell, in the order of their rounds."""
    return [run for run in found if (run["server"], run["clients"], run["prompt"]) == (name, clients, prompt)]


def ratios(ours: Sequence[Mapping], theirs: Sequence[Mapping], name: str) -> list[float]:
    """Of each round, how often a number of theirs goes into ours."""
    return [one[name] / other[name] for one, other in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    main()
