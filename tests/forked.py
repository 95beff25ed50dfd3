"""The command line in a process that is forked from this one: a fraction of a second instead of some.

It has limits, so that a command that waits for ever or takes all memory is a failure of one test.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS, MEMORY = 60, 3 << 30  # that a command may take, and bytes that it may allocate


def smoothquant(*arguments: object, set_up: Callable[[], object] = lambda: None) -> subprocess.CompletedProcess[str]:
    """Run a command; returns what it said and its status, which is negative for a signal: SIGALRM after `SECONDS`.

    set_up: called in the process before the command.
    """
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        process = os.fork()
        if not process:
            os._exit(_child(words, out, error, set_up))
        _, status = os.waitpid(process, 0)
        said = [path.read_text(encoding="utf-8", errors="backslashreplace") for path in (out, error)]
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(status), *said)


def _child(words: list[str], out: Path, error: Path, set_up: Callable[[], object]) -> int:
    from recipes.cli import main

    try:
        for number, path in ((1, out), (2, error)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        set_up()
        status = main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status
