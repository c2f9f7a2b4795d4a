"""The server: pages to whoever has its token, on the loopback interface alone, and never anything but reading.

Three things keep others out. It answers to loopback names alone, so that no page of the web can reach it under a name
of its own (DNS rebinding). It answers only to the token in the address that it prints, which becomes a cookie that the
browser sends from its own pages alone; so other users of the machine cannot read the prompts, either. And its pages
run no script and load nothing but their style sheet. The report of a run, which may have scripts, runs in a sandbox
that can reach nothing.
"""

import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from flows.view import pages
from flows.view.page import Link, Page, Part, html, style_sheet
from flows.view.runs import Runs
from negcore.errors import NegError, RunError

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
REPORT = "/report/"

_PAGE_POLICY = "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
_REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ICON = "/favicon.ico"
"""Browsers ask for it by themselves, from the sandbox of a report too; there is none."""
_STOP_S = 1
"""Time that an answer under way gets when the server is stopped."""

Text = Annotated[str, Query(max_length=4096)]


def serve(root: Path, port: int, tell: Callable[[str], None]) -> None:
    """Show the runs below a directory until Ctrl-C; the address goes to `tell` once the server can be reached.

    Raises
    ------
    OSError
        If the port is taken.
    """
    token = secrets.token_urlsafe(24)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
        port = listener.getsockname()[1]
        tell(f"http://{HOST}:{port}/?token={token}")
        config = uvicorn.Config(
            view_app(Runs(root), token, port),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP_S,
        )
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal that stopped it once more
            uvicorn.Server(config).run(sockets=[listener])


def view_app(runs: Runs, token: str, port: int) -> FastAPI:
    """Return the application that shows runs to whoever has the token."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_pages(app, runs, lambda name: _report_key(token, name))
    cookie = f"neg-view-{port}"  # browsers share cookies among all ports of a host

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.query_params.get("token")
        if given is not None and _same(given, token):
            response: Response = RedirectResponse("/", 303)
            response.set_cookie(cookie, token, httponly=True, samesite="strict")
        elif request.url.path == _ICON:
            response = Response(status_code=204, headers={"Cross-Origin-Resource-Policy": "cross-origin"})
        elif _same(request.cookies.get(cookie, ""), token) or request.url.path.startswith(REPORT):
            response = await answer(request)
        else:
            response = _plain(403, "Open the address that neg view printed: its token is missing or wrong here.")
        for name, value in {**_HEADERS, "Content-Security-Policy": _PAGE_POLICY}.items():
            response.headers.setdefault(name, value)
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    for kind in (NegError, RequestValidationError, 404, 405):
        app.add_exception_handler(kind, _refusal)
    return app


def _add_pages(app: FastAPI, runs: Runs, key_of: Callable[[str], str]) -> None:
    @app.get("/")
    def index() -> HTMLResponse:
        return _page(pages.index(runs))

    @app.get("/style.css")
    def style() -> Response:
        return Response(style_sheet("style.css"), media_type="text/css")

    @app.get("/stacked.css")
    def stacked() -> Response:
        return Response(style_sheet("stacked.css"), media_type="text/css")

    @app.get("/run")
    def run(run: Text) -> HTMLResponse:
        return _page(pages.run_page(runs, run, f"{REPORT}{key_of(run)}/"))

    @app.get(REPORT + "{key}/{file:path}")
    def report(key: str, file: str) -> Response:
        name = next((name for name in runs.places() if _same(key_of(name), key)), None)
        if name is None:
            raise RunError("there is no such report: open the run's page again")
        content, kind = runs.report_file(name, file)
        headers = {"Content-Security-Policy": _REPORT_POLICY}
        if kind == "application/pdf":  # what shows them in a browser does not run in a sandbox
            headers["Content-Disposition"] = "attachment"
        return Response(content, media_type=kind, headers=headers)

    @app.get("/compare")
    def compare(run: Annotated[list[str], Query(max_length=50)]) -> HTMLResponse:
        return _page(pages.compare_page(runs, run))

    @app.get("/table")
    def table(run: Text, table: Text) -> HTMLResponse:
        return _page(pages.table_page(runs, run, table))

    @app.get("/rows")
    def rows(run: Text, part: Text, first: Annotated[int, Query(ge=0, le=10**9)] = 0) -> HTMLResponse:
        return _page(pages.rows_page(runs, run, part, first))

    @app.get("/row")
    def row(run: Text, part: Text, row: Text) -> HTMLResponse:
        return _page(pages.row_page(runs, run, part, row))

    @app.get("/neuron")
    def neuron(run: Text, neuron: Text, model: Text = "") -> HTMLResponse:
        return _page(pages.neuron_page(runs, run, neuron, model))


def _report_key(token: str, name: str) -> str:
    """Return what opens the report of one run and no other page, as a sandbox sends no cookie along."""
    return hmac.new(token.encode(), name.encode("utf-8", "surrogateescape"), "sha256").hexdigest()


def _same(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _page(page: Page, status: int = 200) -> HTMLResponse:
    return HTMLResponse(html(page), status)


def _plain(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status)


async def _refusal(request: Request, error: Exception) -> HTMLResponse:
    """Tell what cannot be shown, and why."""
    status, reason = 404, "there is no such page"
    if isinstance(error, NegError):
        reason = str(error)
    elif isinstance(error, RequestValidationError):
        status, reason = 400, "something is missing in this address, or is not what belongs there"
    elif getattr(error, "status_code", 404) == 405:
        status, reason = 405, "pages can only be read"
    return _page(Page("This cannot be shown", [Part(lines=[reason, Link("all runs", "/")])]), status)
