"""Run a child process whose output is shown and logged, and which ends when its parent does."""

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
    """The exit status of a command, after running it.

    log: a file for everything that the command prints. line: called with each line of it. Any exception, an
    interruption included, ends the process and all processes that it started.
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
    _signal(process, signal.SIGKILL)  # the rest of the group
    process.wait()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
