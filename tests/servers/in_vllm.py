"""What vLLM says of folders, asked by `vllm_worker` in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.servers.environments import VLLM

WORKER = Path(__file__).with_name("vllm_worker.py")


def in_vllm(folders: Sequence[Path], sequences: Sequence[Sequence[int]]) -> list[dict]:
    """The answer of the worker for each folder. sequences: token ids."""
    asked = {"folders": [str(folder) for folder in folders], "sequences": sequences}
    found = subprocess.run(
        [str(VLLM.python), str(WORKER)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # beside the worker lies `triton`, which is no package of vLLM's
    )
    answers = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(folders), found.stderr[-2000:]
    return answers
