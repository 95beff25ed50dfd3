"""smoothquant serve: an engine behind OpenAI's HTTP protocol."""

from __future__ import annotations

import argparse
import os
import sys

from recipes.cli.ui import Ui
from smoothquant.errors import UserError


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "serve",
        parents=[common],
        help="an engine behind OpenAI's HTTP protocol, on this machine's processor",
        description="Answer OpenAI's requests, /v1/completions and /v1/chat/completions, with an engine: greedy "
        "answers are those of smoothquant generate. Requests join and leave between tokens; an engine that was built "
        "with --attention grouped computes them together, others one after another. "
        "SIGTERM and Ctrl-C finish what runs, and refuse what comes; a second one ends what runs. /v1/models tells "
        "scheme and validation, /metrics counts for Prometheus, /health and /ready need no key. SageMaker asks for "
        "/ping, which needs none, and for /invocations, which takes either request. What a request asks for and this "
        "server does not do (tools, response_format, ...) is refused with status 400.",
    )
    command.add_argument("engine", metavar="ENGINE", help="folder made by smoothquant build onnxruntime or openvino")
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: programs of this machine alone); 0.0.0.0 for all, with keys",
    )
    command.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000); 0 takes a free one")
    command.add_argument("--name", help="name of the model in requests (default: the name of the folder)")
    command.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the keys of which a client must give one, separated by commas",
    )
    command.add_argument(
        "--max-batch", type=int, default=16, metavar="N", help="answers under way at a time (default 16)"
    )
    command.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="answers that may wait, and that one request may ask for (default 256); others are refused with status "
        "429 and Retry-After",
    )
    command.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer together (default: as many as the engine takes and memory holds)",
    )
    command.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time for an answer, waiting included (default 600); then it ends with status 504, or an error in the "
        "stream",
    )
    command.add_argument(
        "--fast-start",
        action="store_true",
        help="believe files that have not changed (size, inode, times) since they were read last, as generate does; "
        "without it every file is read and compared with the manifest, as check --integrity does",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from smoothquant.packages import require

    for module, package in (("fastapi", ""), ("uvicorn", ""), ("prometheus_client", "prometheus-client")):
        require(module, package=package)
    from builders.serving.openai.app import Server
    from builders.serving.openai.run import bound_socket, is_loopback, run
    from builders.serving.openai.service import ServingLimits, open_service

    keys = _keys(arguments.api_key_env)
    place = bound_socket(arguments.host, arguments.port)
    limits = ServingLimits(arguments.max_batch, arguments.max_queue, arguments.max_context, arguments.timeout)
    service = open_service(arguments.engine, arguments.name, limits, fast=arguments.fast_start)
    if not keys and not is_loopback(arguments.host):
        ui.warn(f"--host {arguments.host} without --api-key-env: whoever reaches this machine may use the engine")
    if service.template is None:
        ui.note(f"{service.name} has no chat template: /v1/chat/completions is refused, /v1/completions works")
    engine = service.scheduler.engine
    if limits.context is None and service.length < engine.longest:
        ui.note(
            f"sequences of up to {service.length} tokens: the memory that is left holds no more keys and values of "
            f"{limits.batch}; the engine takes {engine.longest} (--max-batch, --max-context)"
        )
    if not service.scheduler.together:
        ui.note(
            f"{service.name} computes one sequence after another; build onnxruntime --attention grouped computes all"
        )
    host, port = place.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def started() -> None:
        ui.result({"url": url, "model": service.name})
        ui.say(f"{service.name}: {url}")
        sys.stdout.flush()

    run(Server(service, keys), place, started)
    ui.note("stopped")


def _keys(variable: str | None) -> list[str]:
    """The keys in an environment variable; none for no variable. Raises UserError for one that holds none."""
    if variable is None:
        return []
    keys = [key for part in os.environ.get(variable, "").split(",") if (key := part.strip())]
    if not keys:
        raise UserError(f"--api-key-env {variable}: no key in it", expected="an environment variable that holds keys")
    return keys
