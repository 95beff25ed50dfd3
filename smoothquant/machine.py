"""Facts about processor and memory, from Linux. On other systems nothing is known and nothing is assumed."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

INT8_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "asimddp")  # they multiply integers; best first
CGROUPS = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3  # a constant of <malloc.h>
MADV_DONTNEED = 4  # a constant of <sys/mman.h>
C = ctypes.CDLL(None)
ENVIRONMENT = ctypes.c_uint32 * 8  # room for <fenv.h>'s fenv_t
FLUSHES = {  # machine -> the word of fenv_t that is the control register, and its bits that make subnormals zero
    ("Linux", "x86_64"): (7, 0x8040),  # MXCSR: flush-to-zero, denormals-are-zero
    ("Linux", "aarch64"): (0, 1 << 24),  # FPCR: flush-to-zero
}
FLUSH = FLUSHES.get((platform.system(), platform.machine())) if hasattr(C, "fegetenv") else None


def cpu_flags() -> set[str]:
    """The features of this processor, by Linux's names."""
    return {flag for line in cpuinfo() if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


def int8_flag(flags: Collection[str]) -> str:
    """The best of `INT8_FLAGS` that a processor with these features has; "" if it has none."""
    return next((flag for flag in INT8_FLAGS if flag in flags), "")


def cpuinfo() -> list[str]:
    """The lines of /proc/cpuinfo."""
    return _lines(Path("/proc/cpuinfo"))


def physical_cores() -> int:
    """The number of cores that this process may use. Two hardware threads of one core count once."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for core in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        if path.exists():
            siblings.add(path.read_text().strip())
    return len(siblings) or len(allowed)


def free_memory() -> int | None:
    """The bytes that processes may still take: of the machine, or of this control group, if it has a limit that is
    nearer. None where the system does not say."""
    lines = [line.split() for line in _lines(Path("/proc/meminfo"))]
    machine = next((int(line[1]) << 10 for line in lines if line[0] == "MemAvailable:"), None)
    group = _left_in_group()
    return machine if group is None else group if machine is None else min(group, machine)


def _left_in_group() -> int | None:
    """The bytes that this process's control group may still take, of either version; None for no limit."""
    places = [line.split(":", 2) for line in _lines(Path("/proc/self/cgroup"))]
    left = []
    for _, controllers, path in (place for place in places if len(place) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        folder = root / path.strip("/")
        folder = folder if (folder / limit).exists() else root  # a container sees its own group as the root
        while folder.is_relative_to(root):
            found = [next(iter(_lines(folder / name)), "") for name in (limit, used)]
            if all(number.isdecimal() for number in found):
                kept = [line.split() for line in _lines(folder / "memory.stat")]
                files = next((int(line[1]) for line in kept if line[0] in ("inactive_file", "total_inactive_file")), 0)
                left.append(int(found[0]) - int(found[1]) + files)  # which the system gives back
            folder = folder.parent
    return max(0, min(left)) if left else None


def _lines(path: Path) -> list[str]:
    """The lines of a file of the system; none if it is not there."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def return_freed_tensors() -> None:
    """Make the C library return freed blocks of 4 MB and more to the system at once, from now on.

    By itself, glibc raises this limit to 32 MB as such blocks come and go, and keeps smaller ones. The matrices of a
    layer, read and freed one after another, then leave holes in the heap: 50 to 250 MB in an export of a 1 GB model.
    """
    mallopt = getattr(C, "mallopt", None)  # other C libraries have no such limit
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 4 << 20)


def release_mapped(address: int, nbytes: int) -> None:
    """Take pages of a file that is mapped and shared out of this process's memory. The system keeps them in its cache,
    also what was changed, as long as it likes; they come back when they are used. address: of a page's beginning."""
    madvise = getattr(C, "madvise", None)
    if madvise is not None:
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), MADV_DONTNEED)


@contextmanager
def subnormals_as_zero() -> Iterator[None]:
    """Make subnormal numbers count as zero in this thread, for the length of a block. Then it is as it was before.

    The C library reads and sets the thread's control register, which torch and ONNX Runtime set without a way back. On
    a machine that is not of `FLUSHES`, or another system, the thread stays as it is.
    """
    if FLUSH is None:
        yield
        return
    word, bits = FLUSH
    before = ENVIRONMENT()
    C.fegetenv(before)
    within = ENVIRONMENT.from_buffer_copy(before)
    within[word] |= bits
    C.fesetenv(within)
    try:
        yield
    finally:
        C.fesetenv(before)
