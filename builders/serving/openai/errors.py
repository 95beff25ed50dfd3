"""Errors in the form that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

INVALID = "invalid_request_error"
TYPES: Mapping[int, str] = {401: "authentication_error", 429: "rate_limit_error"}  # by status; others by its hundreds


class ApiError(Exception):
    """What a client is told instead of an answer.

    status: the HTTP status. param: the field of the request that is to blame. code: a word for programs. headers: of
    the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def content(self) -> dict[str, dict[str, str | None]]:
        """The error as JSON values."""
        kind = TYPES.get(self.status, INVALID if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that asks for what cannot be."""
    return ApiError(400, message, param=param, code=code)
