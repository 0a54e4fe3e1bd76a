"""Everything that can go wrong with a request, as OpenAI's error object and status."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from aqua_jax.batch.dialect import error_body
from aqua_jax.errors import EngineDeadError, RequestError
from aqua_jax.server.gate import Busy

_log = logging.getLogger(__name__)

INVALID = "invalid_request_error"


class ApiError(Exception):
    """A refusal with its status.

    Attributes:
      status: of HTTP.
      kind: OpenAI's type of the error.
      param: the field it is about, or None.
      code: for programs, or None.
      headers: beside the usual ones.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, param: str | None = None,
        code: str | None = None, headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return error_body(str(self), self.kind, self.param, self.code)


def as_api_error(error: Exception) -> ApiError:
    """The refusal that an error of ours amounts to; what is unknown is a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, Busy):
        return ApiError(
            429, str(error), kind="rate_limit_error", code="queue_full",
            headers={"retry-after": str(error.retry_after_s)},
        )
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), kind="server_error", code="engine_stopped")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return ApiError(500, "an error of the server's; its log says more", kind="server_error")


def error_response(error: Exception) -> Response:
    """The response to an error, with an id of its own; faults of ours are logged under it."""
    refusal = as_api_error(error)
    name = f"req-{uuid.uuid4().hex}"
    if refusal.status == 500:
        _log.error("%s: %r", name, error)
    return JSONResponse(
        refusal.body, refusal.status, {"x-request-id": name, **refusal.headers}
    )


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's hook."""
    return error_response(error)
