"""Several processes of one command, forked from this one, which takes a fraction of a second instead of some for each.

This process keeps the store that they meet at, as torchrun does.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from tests.forked import preload, smoothquant


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def in_a_team(
    count: int,
    *arguments: object,
    of_rank: Mapping[int, tuple[object, ...]] | None = None,
    set_up: Callable[[int], object] = lambda rank: None,
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in some processes; returns what each said. of_rank: other words for some of them. set_up: called in
    each before it begins."""
    from torch.distributed import TCPStore

    preload()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))

    def one(rank: int) -> subprocess.CompletedProcess[str]:
        def begin() -> None:
            os.environ.update(environment(rank, count, store.port))
            set_up(rank)

        return smoothquant(*(of_rank or {}).get(rank, arguments), set_up=begin)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))
