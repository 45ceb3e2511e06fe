"""This module writes problem reports (RFC 9457): a status, what it means, what was wrong with which field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from serve.messages import FieldProblem, Problem

PROBLEM = "application/problem+json"
TITLES = {
    400: "The request is not valid JSON",
    401: "The request carries no known token",
    404: "There is nothing at this address",
    405: "This address does not take this method",
    408: "The request came too slowly",
    409: "Somebody else changed what this needs",
    413: "The request is too large",
    415: "The request is in no form that is read here",
    421: "This server does not answer to that name",
    422: "The request cannot be used",
    429: "The server is busy",
    500: "The server made a mistake",
    503: "The server is not ready",
    504: "The answer took too long",
}


def briefly(status: int, detail: str, retry_after_s: int | None) -> Response:
    """Write one of which there is no more to say."""
    return problem(status, detail, (), retry_after_s)


def problem(
    status: int,
    detail: str,
    errors: Sequence[FieldProblem] = (),
    retry_after_s: int | None = None,
    headers: Any = None,
) -> Response:
    """Write one problem report."""
    title = TITLES.get(status, "The request failed")
    body = Problem(
        type=f"urn:somaflow:problem:{status}",
        title=title,
        status=status,
        detail=detail,
        errors=list(errors),
        retry_after_s=retry_after_s,
    )
    extra = dict(headers or {}) | ({"Retry-After": str(retry_after_s)} if retry_after_s is not None else {})
    return JSONResponse(body.model_dump(exclude_none=True), status, headers=extra, media_type=PROBLEM)
