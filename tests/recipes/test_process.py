"""Streams, signals and limits of the process: one line, an exit status that is not 0, no traceback.

The real command line, in a process of its own, and a new one where its start or its end matter.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from act_scales.store import ActScales
from exporters.export import Source, export
from exporters.onnx.writer import OnnxWriter
from recipes import tiny_llama
from recipes.cli.ui import printable
from smoothquant.settings import SmoothingSettings
from tests.forked import assert_one_line, in_a_new_process, smoothquant
from tests.models import hooked_absmax, open_llama, sample_ids, save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "export"
    inputs = {"model": "m", "act_scales": "a"}
    source = Source(open_llama(model), SmoothingSettings(), hooked_absmax(model, sample_ids()), inputs)
    export(source, [OnnxWriter(out)])
    return out


def shell(line: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A line of shell in which $SMOOTHQUANT is the command."""
    environment = {**os.environ, "SMOOTHQUANT": f"{sys.executable} -m recipes.cli", **options.pop("env", {})}  # type: ignore[dict-item]
    command = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment, **options)  # type: ignore[call-overload]


def test_closed_streams() -> None:
    found = shell("$SMOOTHQUANT recipes >&-")
    assert_one_line(found, 2, "standard output is closed; expected a place for the result")
    assert_one_line(shell("$SMOOTHQUANT generate nowhere - <&-"), 2, "the prompt is empty")
    found = shell("$SMOOTHQUANT recipes 2>&-")
    assert (found.returncode, found.stderr) == (0, "")
    assert "llama-2-7b" in found.stdout
    assert shell("$SMOOTHQUANT recipes <&- >&- 2>&-").returncode == 2


def test_nobody_reads() -> None:
    found = shell("$SMOOTHQUANT recipes | true")
    assert (found.returncode, found.stdout, found.stderr) == (141, "", "")
    found = shell("set +o pipefail; $SMOOTHQUANT recipes | head -1")
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "Recipes", "")


def test_nowhere_to_write() -> None:
    assert_one_line(shell("$SMOOTHQUANT recipes > /dev/full"), 4, "no space left for the output")


def test_ascii_terminals(engine: Path) -> None:
    """Characters that a terminal lacks are shown as escapes."""
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    found = in_a_new_process("recipes", env={**os.environ, **ascii_only})
    assert (found.returncode, found.stderr) == (0, "")
    found = shell(f"printf 'n\\303\\251' | $SMOOTHQUANT generate {engine} - --max-new-tokens 8", env=ascii_only)
    assert found.returncode == 0
    assert found.stdout.startswith("[3 tokens] n\\xe9\n")
    assert found.stdout.isascii()
    assert "Traceback" not in found.stderr


def test_text_that_is_not_unicode(engine: Path, tmp_path: Path) -> None:
    found = shell(f"printf 'x\\377' | $SMOOTHQUANT generate {engine} -")
    assert_one_line(found, 2, "the prompt: not UTF-8 text")
    assert_one_line(
        shell(f"$SMOOTHQUANT generate {engine} $'x\\377'"), 2, "x\\udcff: not UTF-8; expected paths and texts"
    )
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    for words in (("calibrate", odd, "--text", "t.txt", "--out", "s"), ("scales", "show", odd / "s.safetensors")):
        assert_one_line(
            in_a_new_process(*words), 2, "caf\\udce9", "not UTF-8; expected paths and texts in UTF-8; rename"
        )
    found = in_a_new_process("recipes", cwd=odd)  # where one is does not matter
    assert found.returncode == 0, found.stderr


def test_generate(engine: Path) -> None:
    for options, said in (
        (("--seed", 10**30), f"seed {10**30}; expected a number from -2^63 to 2^64 - 1"),
        (("--max-new-tokens", -1), "-1 new tokens; expected 0 or more"),
        (("--temperature", "nan"), "temperature nan"),
    ):
        assert_one_line(smoothquant("generate", engine, "x", *options), 2, said)
    for temperature in ("1e-320", "1e300"):
        found = smoothquant("generate", engine, "x", "--temperature", temperature, "--max-new-tokens", 4)
        assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", ["x\x1b[2J\x9b31m\u202e\r\ny"])
def test_names_do_not_command_the_terminal(name: str, tmp_path: Path) -> None:
    found = smoothquant("scales", "show", tmp_path / f"{name}.safetensors")
    assert found.returncode == 2
    assert printable(found.stderr, keep="\n") == found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_what_is_printable() -> None:
    assert printable("a\x1b[31m\x00\x7f\x85\u2028\u202e\r\n\t") == r"a\x1b[31m\x00\x7f\x85\u2028\u202e\r\n\t"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    kept = "né 漢字 \u200d\U0001f469 שלום \\x1b"
    assert printable(kept) == kept


def without_privileges() -> None:
    """Root, too, is then refused what modes forbid."""
    import ctypes

    drop, override, search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    prctl = ctypes.CDLL(None).prctl
    prctl(drop, override, 0, 0, 0)
    prctl(drop, search, 0, 0, 0)


def test_files_that_may_not_be_read(model: Path, text_file: Path, tmp_path: Path) -> None:
    """No word of a fault in the file, which nobody needs to download again."""
    calibrate = ("calibrate", model, "--text", text_file, "--out", tmp_path / "x.safetensors")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        file = model / name
        mode = file.stat().st_mode
        file.chmod(0)
        try:
            found = in_a_new_process(*calibrate, preexec_fn=without_privileges)
        finally:
            file.chmod(mode)
        assert_one_line(found, 4, f"{file}: no permission; expected a place that you may read")


@pytest.mark.parametrize("limit", [5, 20])
def test_few_file_descriptors(limit: int, engine: Path, model: Path, tmp_path: Path) -> None:
    """It works, or says that files are too many."""

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    scales = tmp_path / "s.safetensors"
    ActScales(hooked_absmax(model, sample_ids())).save(scales)
    for command in (("generate", engine, "x", "--quiet"), ("export", "hf", model, scales, "--out", tmp_path / "out")):
        found = in_a_new_process(*command, preexec_fn=lower)
        assert "Traceback" not in found.stderr
        if found.returncode or (limit == 5 and command[0] == "export"):
            assert found.returncode == 4, found.stderr
            assert "too many open files" in found.stderr.splitlines()[-1]
            assert "raise it: ulimit -n 1024" in found.stderr.splitlines()[-1]
        assert limit < 20 or found.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_one_line(number: signal.Signals, tmp_path: Path) -> None:
    arguments = (
        "calibrate",
        tiny_llama.PATH,
        "--text",
        tiny_llama.CALIBRATION_TEXT,
        "--out",
        tmp_path / "x.safetensors",
    )
    process = start(*arguments, "--quiet")
    _wait_for(lambda: any(tmp_path.iterdir()) or process.poll() is not None)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line[:24] for line in said.splitlines()] == ["smoothquant: interrupted"]


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As after nohup."""
    arguments = ("calibrate", tiny_llama.PATH, "--text", tiny_llama.CALIBRATION_TEXT, "--samples", "4")
    process = start(*arguments, "--out", tmp_path / "x.safetensors", ignored=signal.SIGHUP)
    time.sleep(1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    "meets",
    [
        "raise RuntimeError('KeyboardInterrupt: <EMPTY MESSAGE>')",  # as C++ tells it
        "raise ImportError('numpy failed')",
        "class Late:\n            def __del__(self): time.sleep(9)\n        Late(); time.sleep(9); print('missed')",
    ],
)
def test_an_interrupt_that_a_library_changes_or_drops(meets: str) -> None:
    program = f"""
import os, signal, sys, threading, time
from recipes.cli.process import guarded
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
def command():
    try:
        {"time.sleep(9)" if meets.startswith("raise") else meets}
    except KeyboardInterrupt:
        {meets if meets.startswith("raise") else "raise"}
sys.exit(guarded(command))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert found.returncode == 130
    assert found.stdout == ""
    assert [line[:24] for line in found.stderr.splitlines()] == ["smoothquant: interrupted"]


def test_a_defect_of_ours_shows_its_traceback() -> None:
    """The control: what is nobody's fault but ours is not hidden."""
    program = "import sys\nfrom recipes.cli.process import guarded\nsys.exit(guarded(lambda: 1 / 0))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert found.returncode == 1
    assert "ZeroDivisionError" in found.stderr


def start(*arguments: object, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    def ignore() -> None:
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    command = [sys.executable, "-m", "recipes.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignore)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
