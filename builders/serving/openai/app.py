"""The application: routes, keys and limits.

    POST /v1/completions, /v1/chat/completions      GET /v1/models, /v1/models/NAME
    GET  /health, /ready (without a key), /metrics
    POST /invocations      GET /ping (without a key)

The last two are what SageMaker asks of a container, on port 8080: /ping answers 200 within 2 seconds when requests may
come, /invocations takes a body of either kind, by its field messages or prompt, and may leave out the model.
(https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html)

Whatever goes wrong is told in OpenAI's form, and no request is worth a 500 that the engine did not fail at.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from builders.serving.openai.answering import Answering, ClientGoneError, Mailroom
from builders.serving.openai.answers import AnswerForm, ChatForm, CompletionForm, usage_of
from builders.serving.openai.choice import Piece
from builders.serving.openai.errors import ApiError, invalid
from builders.serving.openai.requests import ChatRequest, CompletionRequest, parse, parse_either
from builders.serving.openai.service import Service, Work

LARGEST_BODY = 8 << 20  # bytes
PATIENCE = 30.0  # seconds in which a body has to arrive
FREE = ("/health", "/ready", "/ping")  # of keys
Read = Callable[[bytes], ChatRequest | CompletionRequest]  # a body; raises ApiError
WORDS = {400: "bad request", 404: "there is nothing at this path", 405: "this path does not take this method"}


class Server:
    """The application over a service. app: for an ASGI server. stopping: whether no new requests are taken.

    keys: of which a client must give one; empty for no keys. service.scheduler runs, or nothing is answered.
    """

    def __init__(self, service: Service, keys: Sequence[str] = ()) -> None:
        self.service = service
        self.stopping = False
        self._mailroom: Mailroom | None = None
        routes = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        routes.add_api_route("/v1/completions", self._completions, methods=["POST"], response_model=None)
        routes.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], response_model=None)
        routes.add_api_route("/invocations", self._invocations, methods=["POST"], response_model=None)
        routes.add_api_route("/v1/models", self._models, response_model=None)
        routes.add_api_route("/v1/models/{name:path}", self._model, response_model=None)
        routes.add_api_route("/health", self._health, response_model=None)
        routes.add_api_route("/ready", self._ready, response_model=None)
        routes.add_api_route("/ping", self._ping, response_model=None)
        routes.add_api_route("/metrics", self._metrics, response_model=None)
        for kind, handler in ((ApiError, self._told), (HTTPException, self._no_route), (Exception, self._defect)):
            routes.add_exception_handler(kind, handler)  # type: ignore[arg-type]
        self.app: ASGIApp = _Guarded(routes, [key.encode("utf-8", "surrogateescape") for key in keys], service)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, partial(parse, kind=CompletionRequest))

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, partial(parse, kind=ChatRequest))

    async def _invocations(self, request: Request) -> Response:
        return await self._answer(request, partial(parse_either, model=self.service.name))

    async def _asked(self, request: Request, read: Read) -> ChatRequest | CompletionRequest:
        """The request in a body. Raises ApiError for one that is refused."""
        if self.stopping:
            raise ApiError(503, "this server stops", code="stopping", headers={"Retry-After": "5"})
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "expected JSON: Content-Type: application/json", code="unsupported_media_type")
        body = await _body(request)
        asked = read(body) if len(body) < 1 << 16 else await asyncio.to_thread(read, body)
        if asked.model != self.service.name:
            raise _unknown(asked.model)
        return asked

    async def _work(self, asked: ChatRequest | CompletionRequest) -> tuple[Work, AnswerForm]:
        """The jobs of a request, and the form of its answer. Raises ApiError for one that cannot be answered."""
        service = self.service
        if isinstance(asked, ChatRequest):
            work = await asyncio.to_thread(service.chat, asked)
            return work, ChatForm(asked.model, service.spelling, bool(asked.logprobs))
        work = await asyncio.to_thread(service.completion, asked)
        return work, CompletionForm(asked.model, service.spelling, asked.logprobs is not None)

    async def _answer(self, request: Request, read: Read) -> Response:
        asked = await self._asked(request, read)
        work, form = await self._work(asked)
        if self._mailroom is None or self._mailroom.loop is not asyncio.get_running_loop():
            self._mailroom = Mailroom()
        service = self.service
        answering = Answering(service.scheduler, self._mailroom, service.metrics, work.jobs, work.choices)
        pieces = answering.pieces(request.receive)
        if asked.stream:
            try:
                first = await anext(pieces)  # what fails before has a status of its own
            except ClientGoneError:
                return Response(status_code=499)
            return _Streamed(_chunks(first, pieces, answering, work, form, asked.include_usage))
        found: list[list[Piece]] = [[] for _ in work.choices]
        try:
            async for index, piece in pieces:
                found[index].append(piece)
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(form.whole(work.choices, found, usage_of(work.prompts, work.choices)))

    async def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self.service.model]})

    async def _model(self, name: str) -> Response:
        if name != self.service.name:
            raise _unknown(name)
        return JSONResponse(self.service.model)

    async def _health(self) -> Response:
        if not self.service.scheduler.alive:
            raise ApiError(503, "the engine's thread has ended; start this server again", code="engine_failed")
        return JSONResponse({"status": "ok"})

    async def _ready(self) -> Response:
        if self.stopping:
            raise ApiError(503, "this server stops", code="stopping")
        return JSONResponse({"status": "ready"})

    async def _ping(self) -> Response:
        await self._health()
        return await self._ready()

    async def _metrics(self) -> Response:
        return Response(self.service.metrics.page(), media_type=self.service.metrics.content_type)

    async def _told(self, request: Request, error: ApiError) -> Response:
        return error.response

    async def _no_route(self, request: Request, error: HTTPException) -> Response:
        said = WORDS.get(error.status_code, str(error.detail))
        code = "not_found" if error.status_code == 404 else None
        message = f"{request.method} {request.url.path}: {said}"
        return ApiError(error.status_code, message, code=code, headers=error.headers).response

    async def _defect(self, request: Request, error: Exception) -> Response:
        return ApiError(500, "this server failed; its log says more", code="internal_error").response  # uvicorn logs it


class _Guarded:
    """Lets those in who give a key, and counts what was refused."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes], service: Service) -> None:
        self._app, self._keys, self._service = app, keys, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._service.metrics.refused.labels(str(message["status"])).inc()
            await send(message)

        if scope["path"] not in FREE and not self._known(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            error = ApiError(401, "expected a key: Authorization: Bearer KEY", code="invalid_api_key", headers=headers)
            return await error.response(scope, receive, counted)
        return await self._app(scope, receive, counted)

    def _known(self, scope: Scope) -> bool:
        """Whether the client has a key. The time that this takes tells nothing of the keys."""
        if not self._keys:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        found = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        return kind.lower() == b"bearer" and any(found)


class _Streamed(Response):
    """Server-sent events. chunks: what is sent, as it comes."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _chunks(
    first: tuple[int, Piece],
    pieces: AsyncIterator[tuple[int, Piece]],
    answering: Answering,
    work: Work,
    form: AnswerForm,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield the events of a streamed answer, those together that are there together."""
    usage: dict | None = {} if include_usage else None
    lines = [
        _event(form.chunk(begun, usage))
        for index, choice in enumerate(work.choices)
        if (begun := form.begin(index, choice)) is not None
    ]
    async with aclosing(pieces):  # type: ignore[type-var]
        try:
            lines += _parts(form, usage, *first)
            async for index, piece in pieces:
                lines += _parts(form, usage, index, piece)
                if lines and not answering.more():
                    yield "".join(lines)
                    lines = []
        except ApiError as error:
            yield "".join((*lines, _event(error.content)))
            return
        except ClientGoneError:
            return
    if include_usage:
        lines.append(_event(form.chunk(None, usage_of(work.prompts, work.choices))))
    yield "".join((*lines, "data: [DONE]\n\n"))


def _parts(form: AnswerForm, usage: dict | None, index: int, piece: Piece) -> list[str]:
    """The events of a piece: none for one that adds nothing."""
    if not (piece.text or piece.tokens or piece.reason):
        return []
    return [_event(form.chunk(form.part(index, piece), usage))]


def _event(content: object) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"there is no model {name!r} here; GET /v1/models", param="model", code="model_not_found")


async def _body(request: Request) -> bytes:
    """The body of a request. Raises ApiError for one that is too large, or does not arrive."""
    length = request.headers.get("content-length", "")
    too_large = ApiError(413, f"the body has more than {LARGEST_BODY} bytes", code="body_too_large")
    if length.isdecimal() and len(length) < 20 and int(length) > LARGEST_BODY:
        raise too_large

    async def whole() -> bytes:
        found = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise invalid("the body broke off")
            found += message.get("body", b"")
            if len(found) > LARGEST_BODY:
                raise too_large
            if not message.get("more_body", False):
                return bytes(found)

    try:
        return await asyncio.wait_for(whole(), PATIENCE)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {PATIENCE:.0f} s", code="timeout") from error
