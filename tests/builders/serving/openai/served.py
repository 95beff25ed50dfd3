"""A server in a process of its own, which can import neither torch nor transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

BARE = "import sys\nfor name in ('torch', 'transformers', 'safetensors', 'onnx'): sys.modules[name] = None\n"
COMMAND = "from recipes.cli import main\nsys.exit(main(sys.argv[1:]))"
SLOW = """
import time
from builders.serving.scheduler import Scheduler
step = Scheduler._step
def slow(self):
    time.sleep(0.02)
    step(self)
Scheduler._step = slow
"""  # a server that takes 20 ms longer for every token


@dataclass(frozen=True)
class Process:
    """A server that answers. url: ends with /v1."""

    process: subprocess.Popen[str]
    url: str

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)


@contextmanager
def served(engine: Path, *options: str, before: str = "", env: Mapping[str, str] | None = None) -> Iterator[Process]:
    """A server of an engine. before: what its process does first. env: more of its environment."""
    command = [sys.executable, "-c", BARE + before + COMMAND, "serve", str(engine), "--port", "0", "--quiet", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {})
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line, process.stderr and process.stderr.read()
            yield Process(process, line.split(": ", 1)[1].strip())
        finally:
            process.terminate()
