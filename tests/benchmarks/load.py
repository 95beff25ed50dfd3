"""A server under load, for the benchmarks that need one."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "4",
}


@contextmanager
def server(command: Sequence[object], port: int, log: Path) -> Iterator[subprocess.Popen]:
    """A server of OpenAI's protocol, from when it is ready. log: what it says is written there."""
    words, environment = [*map(str, command), "--port", str(port)], os.environ | ENVIRONMENT
    with log.open("w") as file:
        started = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            for _ in range(240):
                if started.poll() is not None:
                    raise RuntimeError(log.read_text()[-2000:])
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").read()
                    break
                except OSError:
                    time.sleep(0.5)
            yield started
        finally:
            started.terminate()
            started.wait()
