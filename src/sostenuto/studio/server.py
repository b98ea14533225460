"""The studio's web server: one page, and what it asks of the session."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sostenuto.errors import InputError, SostenutoError
from sostenuto.studio.session import Session, Wish

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MOST_BYTES = 2**20
# Everything is in the page itself: nothing is fetched from elsewhere, and no other page may send requests here.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data: 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def app(session: Session, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """The web application of a session.

    Args:
        session: what it works on.
        hosts: the host names that requests may name; others are refused, so that no foreign page reaches it by a name of
            its own.
    """
    page = files("sostenuto.studio").joinpath("page.html").read_text(encoding="utf-8")

    async def index(_: Request) -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    def asked(work: Callable[[Request, Any], Any]) -> Callable[[Request], Any]:
        """A route whose errors become a line for the page."""

        async def route(request: Request) -> Response:
            try:
                body = await _body(request) if request.method == "POST" else None
                return JSONResponse(await run_in_threadpool(work, request, body), headers=_HEADERS)
            except SostenutoError as error:
                return JSONResponse({"message": " ".join(str(error).split())}, 400, headers=_HEADERS)
            except Exception as error:  # whatever a scheduler or a pipeline raises is told to the page
                return JSONResponse({"message": f"{type(error).__name__}: {error}"}, 500, headers=_HEADERS)

        return route

    async def generate(request: Request) -> Response:
        try:
            wish = Wish.of(await _body(request))
        except SostenutoError as error:
            return JSONResponse({"message": str(error)}, 400, headers=_HEADERS)
        return StreamingResponse(_lines(session.generate(wish)), media_type="application/x-ndjson", headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/api/session", asked(lambda *_: session.describe())),
            Route("/api/frontier", asked(lambda *_: session.frontier())),
            Route("/api/tables", asked(lambda *_: session.saved())),
            Route("/api/tables/{name}", asked(lambda request, _: session.load(request.path_params["name"]))),
            Route(
                "/api/tables/{name}",
                asked(lambda request, body: {"saved": session.save(request.path_params["name"], body)}),
                methods=["POST"],
            ),
            Route("/api/generate", generate, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[*hosts, *(f"[{host}]" for host in hosts if ":" in host)])
        ],
    )


def _lines(events: Iterator[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        yield json.dumps(event) + "\n"


async def _body(request: Request) -> dict[str, Any]:
    # A page of another origin can't send this content type without being asked for, and it isn't answered.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise InputError("a request must have the content type application/json")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _MOST_BYTES:
            raise InputError(f"a request may have at most {_MOST_BYTES} bytes")
    try:
        body = json.loads(content)
    except ValueError as error:
        raise InputError(f"the request is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise InputError("the request must be a JSON object")
    return body
