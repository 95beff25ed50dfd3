"""Digests of files that are written in place."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

from smoothquant.data_file import DataFile


def written(path: Path, content: bytes) -> str:
    file = DataFile(path)
    file.reserve(len(content))
    file.write([(0, memoryview(content))], 0, len(content))
    return file.sha256()


def test_a_forked_process_takes_digests_too(tmp_path: Path) -> None:
    """The thread that took them before stays in the other process: waiting for it would never end."""
    content = b"what a process writes"
    assert written(tmp_path / "before", content) == hashlib.sha256(content).hexdigest()
    process = os.fork()
    if not process:
        signal.alarm(30)
        os._exit(0 if written(tmp_path / "after", content) == hashlib.sha256(content).hexdigest() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
