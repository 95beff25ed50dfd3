"""`smoothquant serve` beside vLLM on the same CPU, under the load of vLLM's own generator.

    python -m tests.benchmarks.serve_speed ENGINE W8A8 [--rounds 7]

ENGINE: made by `build onnxruntime --attention grouped`. W8A8: made by `export w8a8` of the same model and plan, which
vLLM serves in bfloat16 with its INT8 kernels. Both servers run for the whole time and take turns; requests have random
token ids and 64 new tokens each, and no prompts share a beginning. Needs the environment of vLLM (`tests.servers`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from smoothquant.files import scratch
from tests.benchmarks.results import Row, publish
from tests.servers.environments import VLLM

OURS, THEIRS = "smoothquant serve", "vLLM"
PORTS = {OURS: 18611, THEIRS: 18612}
NEW, LONGEST, BATCH = 64, 2048, 16
CELLS = [(clients, prompt) for prompt in (256, 1024) for clients in (1, 4, 16)]
WORKER = Path(__file__).with_name("load_worker.py")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("w8a8", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if VLLM.python is None:
        parser.error("the environment of vLLM is missing: python -m tests.servers vllm")
    ours = [sys.executable, "-m", "recipes.cli", "serve", arguments.engine, "--max-context", LONGEST]
    theirs = [VLLM.python, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.w8a8, "--dtype", "bfloat16"]
    theirs += ["--max-model-len", LONGEST, "--max-num-seqs", BATCH, "--enforce-eager", "--served-model-name", "w8a8"]
    with ExitStack() as stack:
        place = stack.enter_context(scratch())
        stack.enter_context(server(OURS, [*ours, "--max-batch", BATCH, "--name", "w8a8"], place))
        stack.enter_context(server(THEIRS, theirs, place))
        found = measured(arguments.w8a8, arguments.rounds)
    publish("serve_speed", list(rows(found)), {"runs": found})


@contextmanager
def server(name: str, command: list, place: Path) -> Iterator[None]:
    """A server, from when it is ready. place: for its log."""
    with (place / f"{name}.log").open("w") as log:
        started = subprocess.Popen(
            [*map(str, command), "--port", str(PORTS[name])],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "4"},
        )
        try:
            for _ in range(240):
                if started.poll() is not None:
                    raise RuntimeError((place / f"{name}.log").read_text()[-2000:])
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORTS[name]}/v1/models").read()
                    break
                except OSError:
                    time.sleep(0.5)
            yield
        finally:
            started.terminate()
            started.wait()


def measured(tokenizer: Path, rounds: int) -> list[dict]:
    """One entry of each run: its round, server, clients, prompt, and what the generator says."""
    asked = []
    for turn in range(rounds):
        for clients, prompt in CELLS:
            for name in (OURS, THEIRS) if turn % 2 == 0 else (THEIRS, OURS):
                asked.append({"round": turn, "server": name, "clients": clients, "prompt": prompt})
    runs = [load(run, tokenizer, seed) for seed, run in enumerate(asked)]
    found = subprocess.run(
        [str(VLLM.python), str(WORKER)],
        input=json.dumps(runs),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | ENVIRONMENT,
    )
    answers = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    for run, answer in zip(asked, answers, strict=True):
        if answer["completed"] != requests(run["clients"]):
            raise RuntimeError(f"{run}: {answer['completed']} requests were answered")
    return [run | answer for run, answer in zip(asked, answers, strict=True)]


def requests(clients: int) -> int:
    """The number of requests of a run."""
    return max(2, clients)


def load(run: dict, tokenizer: Path, seed: int) -> list[str]:
    """The arguments of a run. seed: no two runs have the same prompts, since servers remember them."""
    options = {
        "backend": "openai",
        "base-url": f"http://127.0.0.1:{PORTS[run['server']]}",
        "endpoint": "/v1/completions",
        "model": "w8a8",
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "random-input-len": run["prompt"],
        "random-output-len": NEW,
        "num-prompts": requests(run["clients"]),
        "max-concurrency": run["clients"],
        "seed": seed,
        "percentile-metrics": "ttft,tpot",
    }
    flags = ["--ignore-eos", "--disable-tqdm"]
    return [part for name, value in options.items() for part in (f"--{name}", str(value))] + flags


def rows(found: list[dict]) -> Iterator[Row]:
    for clients, prompt in CELLS:
        runs = {
            name: [r for r in found if (r["server"], r["clients"], r["prompt"]) == (name, clients, prompt)]
            for name in PORTS
        }
        pairs = list(zip(runs[OURS], runs[THEIRS], strict=True))
        faster = [ours["output_throughput"] / theirs["output_throughput"] for ours, theirs in pairs]
        sooner = [ours["median_ttft_ms"] / theirs["median_ttft_ms"] for ours, theirs in pairs]
        speeds = {name: median(run["output_throughput"] for run in runs[name]) for name in PORTS}
        first = {name: median(run["median_ttft_ms"] for run in runs[name]) for name in PORTS}
        yield Row(
            f"{clients} clients, prompts of {prompt} tokens",
            f"{median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f}) x vLLM's throughput: {speeds[OURS]:.1f} "
            f"against {speeds[THEIRS]:.1f} tokens per second; first token behind {median(sooner):.2f} x vLLM's time: "
            f"{first[OURS]:.0f} against {first[THEIRS]:.0f} ms",
            "throughput 1.2 x, first token 1.0 x" if clients == 1 else "1.0 x each",
        )


if __name__ == "__main__":
    main()
