"""Start a tritonserver on this machine's loopback, and load models into it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tritonclient import grpc

from tests.servers.environments import TRITON

HERE = Path(__file__).parent
STAND_INS = {"onnxruntime": "onnx_backend.py", "tensorrt": "onnx_backend.py", "tensorrtllm": "tensorrtllm_backend.py"}
SECONDS = 60  # that a start may take


class Triton:
    """A server whose models are loaded on demand. repositories: model repositories. folder: for backends and log.

    grpc, http: HOST:PORT. client: of its gRPC service.
    """

    def __init__(self, repositories: list[Path], folder: Path) -> None:
        assert TRITON.python is not None
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        site = TRITON.folder / f"lib/python{version}/site-packages"
        parts, backends = site / "pytriton/tritonserver", folder / "backends"
        shutil.copytree(parts / "backends/python", backends / "python")
        shutil.copy(parts / f"python_backend_stubs/{version}/triton_python_backend_stub", backends / "python")
        for name, program in STAND_INS.items():
            (backends / name).mkdir()
            shutil.copy(HERE / program, backends / name / "model.py")
        ports = free_ports(2)
        self.grpc, self.http = (f"127.0.0.1:{port}" for port in ports)
        command: list[object] = [parts / "bin/tritonserver", "--backend-directory", backends]
        command += [f"--model-repository={repository}" for repository in repositories]
        command += ["--model-control-mode=explicit", "--disable-auto-complete-config", "--exit-timeout-secs=2"]
        command += ["--grpc-address=127.0.0.1", f"--grpc-port={ports[0]}"]
        command += ["--http-address=127.0.0.1", f"--http-port={ports[1]}", "--allow-metrics=false"]
        environment = os.environ | {
            "PATH": f"{TRITON.python.parent}:{os.environ['PATH']}",  # the packages of this python3 are the backend's
            "LD_LIBRARY_PATH": f"{site}/nvidia_pytriton.libs:{sys.base_prefix}/lib",
            "TESTS_PYTHON": sys.executable,
            "TESTS_ROOT": str(HERE.parents[2]),
        }
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.client = grpc.InferenceServerClient(self.grpc)

    def __enter__(self) -> Triton:
        end = time.monotonic() + SECONDS
        while not self._live():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(self.log.read_text()[-2000:])
            time.sleep(0.1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.client.close()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self.kill()

    def kill(self) -> None:
        """End the server at once, and the processes of its Python backend."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def load(self, name: str) -> str | None:
        """Load a model; returns why the server refuses it, or None."""
        try:
            self.client.load_model(name)
        except grpc.InferenceServerException as error:
            return str(error.message())
        return None if self.client.is_model_ready(name) else "not ready"

    def _live(self) -> bool:
        try:
            return bool(self.client.is_server_live(client_timeout=1))
        except grpc.InferenceServerException:
            return False


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports
