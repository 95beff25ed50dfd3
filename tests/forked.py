"""The command line in a process that is forked from this one: a fraction of a second instead of some.

It has limits, so that a command that waits for ever or takes all memory is a failure of one test. Its standard input is
closed. `python -m tests.forked` runs many commands, from a process that starts as its environment says:

    {"name": [word, ...], ...} on standard input    ->    {"name": {"status", "out", "error"}, ...}
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from recipes.cli import main, set_up_libraries

SECONDS, MEMORY = 120, 3 << 30  # that a command may take, and bytes that it may allocate


def smoothquant(*arguments: object, set_up: Callable[[], object] = lambda: None) -> subprocess.CompletedProcess[str]:
    """Run a command; returns what it said and its status, which is negative for a signal: SIGALRM after `SECONDS`.

    set_up: called in the process before its streams are opened.
    """
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        process = os.fork()
        if not process:
            os._exit(_child(words, out, error, set_up))
        _, status = os.waitpid(process, 0)
        said = [path.read_bytes().decode("utf-8", "backslashreplace") for path in (out, error)]
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(status), *said)


def nobody_reads() -> None:
    """Let standard output be a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def _child(words: list[str], out: Path, error: Path, set_up: Callable[[], object]) -> int:
    try:
        os.close(0)
        sys.stdin = None
        encoding = sys.stdout.encoding
        for number, path in ((1, out), (2, error)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        set_up()
        sys.stdout, sys.stderr = (open(number, "w", encoding=encoding, closefd=False) for number in (1, 2))  # noqa: SIM115
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        status = main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    return status


def _many() -> None:
    commands = json.load(sys.stdin)
    set_up_libraries()
    import torch
    import transformers  # noqa: F401 (once for all commands)

    torch.set_num_threads(1)
    found = {name: smoothquant(*words) for name, words in commands.items()}
    content = {
        name: {"status": each.returncode, "out": each.stdout, "error": each.stderr} for name, each in found.items()
    }
    print(json.dumps(content))


if __name__ == "__main__":
    _many()
