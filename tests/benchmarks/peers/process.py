"""A worker, from this side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.peers.forms import PeerForm
from tests.servers.environments import VLLM

ROOT = Path(__file__).parents[3]


class PeerProcess:
    """An engine in a process of its own. Raises RuntimeError where it does not open or does not answer.

    threads: of the engine. log: what the process says beside its answers.
    """

    def __init__(self, peer: PeerForm, folder: Path, threads: int, log: Path) -> None:
        if peer.kind == "vllm":
            command = [VLLM.python, "-m", "tests.benchmarks.peers.vllm_worker", folder, threads]
            path = str(ROOT)
        else:
            command = [sys.executable, "-m", "tests.benchmarks.peers.worker", peer.kind, folder, threads]
            path = os.pathsep.join([str(ROOT), *(one for one in sys.path if one and "site-packages" not in one)])
        self._name, self._log = peer.name, log
        with log.open("a") as said:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                cwd=log.parent,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            )
        self.peak = self._answer()["peak"]

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:  # it is gone, and what it was asked last lies in the pipe
            self._process.kill()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def seconds(self, prompt: int, batch: int, steps: int) -> float:
        """Of a prompt, or of a step behind it (`loop`)."""
        return float(self._ask({"prompt": prompt, "batch": batch, "steps": steps})["seconds"])

    def logits(self, ids: Path, out: Path) -> None:
        """Write the logits of sequences. ids, out: numpy files."""
        self._ask({"ids": str(ids), "logits": str(out)})

    def _ask(self, asked: dict) -> dict:
        assert self._process.stdin is not None
        try:
            print(json.dumps(asked), file=self._process.stdin, flush=True)
        except OSError:  # it is gone
            raise RuntimeError(f"{self._name}: the process ended") from None
        answer = self._answer()
        self.peak = answer["peak"]
        if "failed" in answer:
            raise RuntimeError(f"{self._name}: {answer['failed']}")
        return answer

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            raise RuntimeError(f"{self._name}: {self._log.read_text(errors='replace')[-400:]}")
        return dict(json.loads(line))
