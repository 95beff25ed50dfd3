"""The process around a command: its three streams, the signals that interrupt it, and its exit status.

    0  done                                 4    the disk or another resource failed
    1  an engine missed its thresholds,     130  interrupted
       or a check found errors              141  nobody reads the output any more
    2  bad input
    3  a package or a device is missing

Whatever ends a command is one line on stderr, never a traceback; what is left over is a defect of ours. Of several
processes that share a command, the first that fails says its line.
"""

from __future__ import annotations

import _thread
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

from recipes.cli.ui import printable
from smoothquant import torchrun
from smoothquant.errors import UserError
from smoothquant.packages import what_is_missing

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a scheduler's end, a terminal that is closed
INTERRUPTED = "interrupted; nothing half-written is left in place, and the same command goes on from here"
FULL = "no space left for the output; free some and run the same command again, it goes on from here"
FILES = "too many open files for the limit of this shell; expected room for a few hundred; raise it: ulimit -n 1024"
MEMORY = "out of memory; expected room for a layer of the model; close other programs or use less --text"
PERMISSION = "no permission; expected a place that you may read, or write; ask its owner, or change that: chmod"
LACKS = {  # number of an OSError -> what the machine lacks
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.ENOMEM: MEMORY,
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
}


class Interrupt:
    """A handler of signals that raises KeyboardInterrupt. came: whether a signal was received.

    Libraries turn a KeyboardInterrupt into errors of their own, and drop one that meets a destructor: that one is
    raised again.
    """

    def __init__(self) -> None:
        self.came = False
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self)
        sys.unraisablehook = self._dropped

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt

    def _dropped(self, what: object) -> None:
        if isinstance(getattr(what, "exc_value", None), KeyboardInterrupt):
            threading.Timer(0.1, _thread.interrupt_main).start()  # not from here: this, too, runs in a destructor
        elif not self.came:
            sys.__unraisablehook__(what)  # type: ignore[arg-type]


def guarded(command: Callable[[], None]) -> int:
    """Run a command; returns the exit status. What ends it is said in one line."""
    interrupt = Interrupt()
    try:
        open_streams()
        try:
            command()
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 141
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        message, status = (INTERRUPTED, 130) if interrupt.came else _verdict(error)
        if torchrun.speaks():
            _say(f"smoothquant: {printable(message)}")
        return status
    return 0


def open_streams() -> None:
    """Open what was closed, so that no file of ours gets a stream's number; let characters that a terminal lacks be
    written as escapes. Raises UserError if nobody could read the result."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it is open to the end)
    if closed:
        raise UserError("standard output is closed", expected="a place for the result", do="to drop it: > /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_words(words: Sequence[str]) -> None:
    """Raise UserError for a word of the command line that is not UTF-8: tokenizers and safetensors refuse it."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            narrow = sys.getfilesystemencoding() != "utf-8"  # then even UTF-8 seems to be none
            do = "let Python read it: export PYTHONUTF8=1" if narrow else "rename the file"
            raise UserError(f"{word}: not UTF-8", expected="paths and texts in UTF-8", do=do) from error


def _verdict(error: BaseException) -> tuple[str, int]:
    """The line and the exit status for what ended a command. Raises what is nobody's fault but ours."""
    if isinstance(error, ImportError):
        error = what_is_missing(error) or error
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, 130
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        usual = f"{error.strerror or error}; check that the place exists and may be read or written"
        return where + LACKS.get(error.errno or 0, usual), 4
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return MEMORY, 4
    raise error


def _say(line: str) -> None:
    try:
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone, or the disk that stdout is on is full
        _drop_output()
        print(line, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Send what is still to be written nowhere, so that Python's exit does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        stream = (sys.stdout, sys.stderr)[number - 1]
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, number)
