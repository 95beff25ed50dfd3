"""A child process whose words are seen and kept, and that never outlives its parent's interest."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from smoothquant.files import open_log

GRACE = 10.0  # seconds between asking a process to end and ending it


def run_logged(command: Sequence[str], log: Path, line: Callable[[str], None]) -> int:
    """Run a command; returns its exit status. line: gets every line that it prints, on either stream, as `log` does.

    An exception on the way, an interruption too, ends the process and all that it started.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with (
        open_log(log) as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # a group of its own: one signal reaches all of it, and Ctrl-C only this process
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for words in process.stdout:
                file.write(words)
                file.flush()
                line(words.rstrip())
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[str]) -> None:
    _signal(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _signal(process, signal.SIGKILL)  # whoever is left of the group
    process.wait()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
