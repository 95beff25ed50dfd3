"""Run a server until it is told to stop: its socket, and what signals do.

SIGTERM or SIGINT: no new requests are taken (503, and /ready says so), those under way are finished, and the server
ends. At a second signal, it ends them.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import uvicorn

from builders.serving.openai.app import Server
from smoothquant.errors import UserError

LAST_WORDS = 5  # seconds in which the last answers have to be sent
STOPS = (signal.SIGTERM, signal.SIGINT)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet. Raises UserError for an address that cannot be had."""
    where = f"--host {host} --port {port}"
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port}", expected="a number from 0 to 65535; 0 takes a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"{where}: no such address", expected="an address of this machine: 127.0.0.1") from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1)  # two sockets may be bound to a port, but one of them listens
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{where}: another program listens there", do="choose another --port, or end it") from error
        reason = os.strerror(error.errno or 0)
        raise UserError(f"{where}: {reason}", expected="a port of this machine that you may take") from error
    return made


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server at an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(server: Server, place: socket.socket, started: Callable[[], None]) -> None:
    """Serve until a signal comes. place: of `bound_socket`. started: called when the first request may come."""
    server.service.scheduler.start()
    try:
        asyncio.run(_serve(server, place, started))
    finally:
        server.service.scheduler.stop(grace=0)


async def _serve(server: Server, place: socket.socket, started: Callable[[], None]) -> None:
    config = uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=LAST_WORDS,
    )
    http = _Http(config, started)
    loop = asyncio.get_running_loop()
    stops: list[asyncio.Task[None]] = []

    def stop() -> None:
        server.stopping = True
        grace = 0.0 if stops else server.service.limits.timeout + 1
        stops.append(asyncio.ensure_future(_stop(server, http, grace)))

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a script's background job is not meant by Ctrl-C
            loop.add_signal_handler(number, stop)
    await http.serve([place])
    await asyncio.gather(*stops)


async def _stop(server: Server, http: uvicorn.Server, grace: float) -> None:
    await asyncio.to_thread(server.service.scheduler.stop, grace)
    http.should_exit = True


class _Http(uvicorn.Server):
    """uvicorn's server, without its handlers of signals. started: called when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()
