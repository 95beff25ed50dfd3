"""The command line in a process of its own: forked from this one, which takes a fraction of a second instead of some;
or new, where a test is about the process itself.

A forked one has limits, so that a command that waits for ever or takes all memory is a failure of one test. `python -m
tests.forked` runs many commands, from a process that starts as its environment says:

    {"name": [word, ...], ...} on standard input    ->    {"name": {"status", "out", "error"}, ...}
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from recipes.cli import main, set_up_libraries

SECONDS, MEMORY = 120, 3 << 30  # that a command may take, and bytes that it may allocate
MODULES = (
    "torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder",
    "transformers.models.llama.modeling_llama",
    "compressed_tensors",
    "onnx",
    "onnxruntime",
    "recipes.cli",
    "recipes.families",
    "recipes.models",
    "recipes.pipeline",
    "recipes.trust",
    "exporters.export",
    "exporters.huggingface",
    "exporters.onnx",
    "exporters.trtllm",
    "builders.onnxruntime",
    "builders.tensorrt_llm",
    "builders.transformers",
    "builders.validate",
    "builders.validate.report",
)


def smoothquant(
    *arguments: object,
    set_up: Callable[[], object] = lambda: None,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command; returns what it said and its status, which is negative for a signal: SIGALRM after `SECONDS`.

    set_up: called in the process before its streams are opened. env: its environment, if not this one's. text: what
    stands on standard input, which is closed without.
    """
    preload()
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        given, out, error = (Path(folder, name) for name in ("given", "out", "error"))
        if text is not None:
            given.write_text(text, encoding="utf-8")
        process = os.fork()
        if not process:
            os._exit(_child(words, given, out, error, set_up, env))
        _, status = os.waitpid(process, 0)
        said = [path.read_bytes().decode("utf-8", "backslashreplace") for path in (out, error)]
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(status), *said)


def preload() -> None:
    """Import what the command line needs, so that forked processes have it at once."""
    for name in MODULES:
        import_module(name)


def in_a_new_process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell does. options: of subprocess.run."""
    command = [sys.executable, "-m", "recipes.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, **options)  # type: ignore[call-overload]


def assert_one_line(found: subprocess.CompletedProcess[str], status: int, *said: str) -> None:
    """The error is all that stands on stderr."""
    assert found.returncode == status, found.stderr
    [error] = found.stderr.splitlines()
    assert error.startswith("smoothquant: ")
    for part in said:
        assert part in error


def nobody_reads() -> None:
    """Let standard output be a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def small_files(limit: int) -> Callable[[], None]:
    """Let no file grow beyond `limit` bytes: what a quota or a full disk does in the middle of writing."""

    def apply() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return apply


def _child(
    words: list[str],
    given: Path,
    out: Path,
    error: Path,
    set_up: Callable[[], object],
    env: Mapping[str, str] | None,
) -> int:
    try:
        gc.freeze()  # a collection would go through all that the imports have made, and copy it
        os.close(0)
        sys.stdin = open(given, encoding="utf-8") if given.exists() else None  # noqa: SIM115 (it is number 0)
        if env is not None:
            _change_environment(env)
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


def _change_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]  # it reads the environment when it is imported


def _many() -> None:
    commands = json.load(sys.stdin)
    set_up_libraries()
    preload()
    import torch

    torch.set_num_threads(1)
    found = {name: smoothquant(*words) for name, words in commands.items()}
    content = {
        name: {"status": each.returncode, "out": each.stdout, "error": each.stderr} for name, each in found.items()
    }
    print(json.dumps(content))


if __name__ == "__main__":
    _many()
