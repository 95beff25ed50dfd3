"""What `docker build` and `docker run` do, where there is no Docker: the steps of a Dockerfile in a root file system of
Debian's, made by mmdebstrap, and its entry point in namespaces of its own. It takes root.

In place of the base image, python:3.11-slim, stands Debian 12, whose Python has the same version; pip is told that it
may install into it. A container has a network of its own, from which nothing is reached.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.docker.dockerfile import Stage, assignments
from tests.servers.environments import FINISHED, RootFileSystem

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OF_THE_BASE = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_ROOT_USER_ACTION": "ignore"}
HANDED_ON = ("PIP_CERT", "PIP_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "no_proxy")
OF_THE_NETWORK = ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt")  # of this machine, while a step runs
NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def nbytes(folder: Path) -> int:
    """The bytes of all files, each once, as an image's layers count them."""
    found = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        found[facts.st_ino] = facts.st_size if path.is_file() and not path.is_symlink() else 0
    return sum(found.values())


class Image:
    """A root file system in which the steps of a stage were done. context: the folder that is sent to Docker.

    Raises KeyError for an instruction that is not known here, CalledProcessError for a step that fails.
    """

    def __init__(self, base: RootFileSystem, root: Path, context: Path, stage: Stage) -> None:
        subprocess.run(["cp", "--archive", "--reflink=auto", base.folder, root], check=True)
        (root / FINISHED).unlink()
        self.root, self._context = root, context
        self.environment = {"PATH": SYSTEM_PATH}
        self.folder, self.user = "/", "0"
        self.entrypoint: list[str] = []
        self.command: list[str] = []
        self.health: list[str] = []
        self._mounted: list[Path] = []  # mount points of the last container
        for word, rest in stage.steps:
            DO[word](self, rest)

    def environ(self, rest: str) -> None:
        self.environment |= assignments(rest)

    def workdir(self, rest: str) -> None:
        self.folder = os.path.join(self.folder, rest)
        self.inside(self.folder).mkdir(parents=True, exist_ok=True)

    def as_user(self, rest: str) -> None:
        self.user = rest

    def copy(self, rest: str) -> None:
        source, target = rest.split()
        ignored = (self._context / ".dockerignore").read_text().split()

        def left_out(folder: str, names: list[str]) -> list[str]:
            inner = Path(folder) != self._context
            patterns = [line.removeprefix("**/") for line in ignored if line.startswith("**/") or not inner]
            return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]

        found, place = self._context / source, self.inside(os.path.join(self.folder, target))
        if found.is_dir():
            shutil.copytree(found, place, ignore=left_out, dirs_exist_ok=True)
        else:
            shutil.copy2(found, place)

    def run(self, rest: str) -> None:
        mounts = [f"mount --bind {path} {shlex.quote(str(self.inside(path)))}" for path in OF_THE_NETWORK]
        for path in OF_THE_NETWORK:
            self.inside(path).touch()
        given = OF_THE_BASE | {name: os.environ[name] for name in HANDED_ON if name in os.environ}
        script = self._entering(mounts, given, ["/bin/sh", "-c", rest])
        subprocess.run(["unshare", "--mount", "--propagation=private", "/bin/sh", "-c", script], check=True)

    def inside(self, path: str) -> Path:
        """A path of the container, as this machine sees it."""
        return self.root / path.lstrip("/")

    def start(
        self, arguments: Sequence[str], mounts: Mapping[Path, str], given: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """`docker run --read-only --tmpfs /tmp -v HERE:THERE:ro -e NAME=VALUE IMAGE ARGUMENT ...`"""
        for place in self._mounted:
            place.rmdir()
        self._mounted = [self.inside(there) for there in mounts.values()]
        for place in self._mounted:
            place.mkdir(parents=True)
        lines = ["ip link set lo up"]
        for here, there in mounts.items():
            point = shlex.quote(str(self.inside(there)))
            lines += [f"mount --bind {shlex.quote(str(here))} {point}"]
            lines += [f"mount -o remount,bind,ro {point}"]
        root = shlex.quote(str(self.root))
        lines += [f"mount -t tmpfs tmpfs {root}/tmp", f"mount -o remount,bind,ro {root}"]
        words = [*self.entrypoint, *(arguments or self.command)]
        spaces = ["--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child", "--propagation=private"]
        return subprocess.Popen(
            ["unshare", *spaces, "/bin/sh", "-c", self._entering(lines, given, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _entering(self, mounts: Sequence[str], given: Mapping[str, str], words: Sequence[str]) -> str:
        """A script of /bin/sh that becomes a program of the image, in a mount namespace of its own."""
        root = shlex.quote(str(self.root))
        user = f"--userspec={self.user}:{self.user}"
        named = [f"{name}={value}" for name, value in {**self.environment, **given}.items()]
        command = ["chroot", user, "--groups=", str(self.root), "/usr/bin/env", "-i", "-C", self.folder, *named, *words]
        first = ["set -e", f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc"]
        first += [f"mount --bind /dev {root}/dev"]
        return "\n".join([*first, *mounts, f"exec {shlex.join(command)}"])


def _exec_form(rest: str) -> list[str]:
    words = json.loads(rest)
    assert all(isinstance(word, str) for word in words), rest
    return words


DO = {
    "ENV": Image.environ,
    "WORKDIR": Image.workdir,
    "USER": Image.as_user,
    "COPY": Image.copy,
    "RUN": Image.run,
    "EXPOSE": lambda image, rest: None,
    "ENTRYPOINT": lambda image, rest: setattr(image, "entrypoint", _exec_form(rest)),
    "CMD": lambda image, rest: setattr(image, "command", _exec_form(rest)),
    "HEALTHCHECK": lambda image, rest: setattr(image, "health", _exec_form(rest.partition(" CMD ")[2])),
}


@dataclass(frozen=True)
class Container:
    """A container that runs. pid: of its first process, on this machine."""

    image: Image
    process: subprocess.Popen[str]
    pid: int

    def execute(self, words: Sequence[str], user: str | None = None) -> subprocess.CompletedProcess[str]:
        """`docker exec`: a program beside the first process, as the image's user or another."""
        user = self.image.user if user is None else user
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--root", f"--setuid={user}"]
        named = [f"{name}={value}" for name, value in self.image.environment.items()]
        command = [*enter, f"--setgid={user}", "/usr/bin/env", "-i", "-C", self.image.folder, *named, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    @contextmanager
    def network(self) -> Iterator[None]:
        """This thread is in the container's network, in place of a port that is handed on."""
        with open("/proc/thread-self/ns/net") as here, open(f"/proc/{self.pid}/ns/net") as there:
            _enter_network(there.fileno())
            try:
                yield
            finally:
                _enter_network(here.fileno())


def _enter_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def running(
    image: Image, *arguments: str, mounts: Mapping[Path, str], given: Mapping[str, str] | None = None
) -> Iterator[Container]:
    """A container, from its first line of output on."""
    with image.start(arguments, mounts, given or {}) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            [pid] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield Container(image, process, int(pid))
        finally:
            process.kill()
