"""Join the other processes that torchrun has started, and end together with them.

    torchrun --nproc-per-node 2 --no-python smoothquant calibrate MODEL --text FILE --out F

Only torchrun makes ranks: it says so in TORCHELASTIC_RUN_ID. A WORLD_SIZE alone may be another tool's, and counts
machines, or nothing. Messages go by gloo, and between GPUs by NCCL.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from smoothquant.team import ALONE, Team

TORCHRUN = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(hours=12)  # with a rank that is alive: one may write what all have made
MOMENT = timedelta(seconds=10)  # for a rank that fails to find the store of torchrun
FAILED = "smoothquant.failed"  # in that store: how many ranks have failed


def is_one_of_several() -> bool:
    """Whether torchrun has started this process, and others."""
    return all(name in os.environ for name in TORCHRUN)


@contextmanager
def joined() -> Iterator[Team]:
    """The ranks that torchrun has started; a process alone where it has not started this one."""
    if not is_one_of_several():
        yield ALONE
        return
    import torch
    from torch import distributed

    place = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.device_count() > place
    if gpu:
        torch.cuda.set_device(place)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
        yield Team(distributed.get_rank(), distributed.get_world_size(), place, linked=True)
    except BaseException:
        speaks()  # before the others miss this process
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@functools.cache
def speaks() -> bool:
    """Whether this process, which has failed, says why: of several the first one does, and the others end for that."""
    if not is_one_of_several():
        return True
    from torch import distributed

    try:
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=MOMENT
        )
        return store.add(f"{FAILED}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:  # torchrun has ended
        return True


os.register_at_fork(after_in_child=speaks.cache_clear)  # it is another process
