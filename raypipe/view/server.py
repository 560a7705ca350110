"""The server of the page: loopback only, with a token, for one person.

- It listens on 127.0.0.1. Requests whose Host header names another machine are refused, so that a
  web page cannot reach it by a name of its own that it points to this machine (DNS rebinding).
- Every answer about the run needs the token, in a header. Pages of other origins cannot set it, and
  the address in the browser's history loses it as soon as the page is open.
- The page loads nothing from elsewhere and runs no script but its own (Content-Security-Policy).
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from raypipe import report
from raypipe.errors import RaypipeError
from raypipe.view.answers import ERRORS, Answers

LOOPBACK = "127.0.0.1"
LOCAL_NAMES = {LOOPBACK, "localhost", "::1"}
"""Names of this machine. The port is not compared: a tunnel can lead from another one."""
TOKEN_HEADER = "X-Raypipe-Token"
MAX_BODY = 8 << 20
TIMEOUT_S = 30
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FOLDER = Path(__file__).parent
PAGES = {
    "/": ("text/html", [FOLDER / "view.html"]),
    "/view.js": ("text/javascript", [FOLDER / "view.js"]),
    "/view.css": ("text/css", [Path(report.__file__).parent / "page.css", FOLDER / "view.css"]),
}
"""Files of the page, which hold nothing of the run."""


class ViewServer(ThreadingHTTPServer):
    """Serves the page about one run.

    Parameters
    ----------
    answers : Answers
        The run.
    port : int
        Port on the loopback interface; 0: a free one.

    Attributes
    ----------
    token : str
        What a request must know.
    """

    daemon_threads = True

    def __init__(self, answers: Answers, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        self.questions: Mapping[str, Callable[[Mapping[str, str]], dict[str, Any]]] = {
            "/api/run": answers.run,
            "/api/samples": answers.search,
            "/api/images": answers.images,
            "/api/sample": answers.sample,
        }
        self.mark = answers.mark
        super().__init__((LOOPBACK, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a browser that closed a connection."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """The address to open. A browser keeps what follows # to itself."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/#token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "raypipe", ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        if not self._from_here():
            return
        place = urlsplit(self.path)
        if place.path in PAGES:
            kind, files = PAGES[place.path]
            self._send(HTTPStatus.OK, b"\n".join(file.read_bytes() for file in files), kind)
        elif self._knows_token():
            question = self.server.questions.get(place.path)
            if question is None:
                self._refuse(HTTPStatus.NOT_FOUND, "no such address")
            else:
                self._answer(lambda: question(dict(parse_qsl(place.query))))

    def do_POST(self) -> None:
        if not self._from_here() or not self._knows_token():
            return
        if self.path != "/api/mark":
            self._refuse(HTTPStatus.NOT_FOUND, "no such address")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too many samples at once")
            return
        body = self.rfile.read(int(length))
        self._answer(lambda: self.server.mark(dict(json.loads(body))))

    def _from_here(self) -> bool:
        """Refuse requests that reach this server by another name."""
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            name = None
        if name in LOCAL_NAMES:
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "this server answers to localhost only")
        return False

    def _knows_token(self) -> bool:
        given = self.headers.get(TOKEN_HEADER, "").encode("utf-8", "replace")
        if hmac.compare_digest(given, self.server.token.encode()):
            return True
        self._refuse(
            HTTPStatus.FORBIDDEN,
            "the token is missing or wrong; open the address that `raypipe view` printed",
        )
        return False

    def _answer(self, question: Callable[[], dict[str, Any]]) -> None:
        try:
            answer = json.dumps(question(), allow_nan=False).encode()
        except ERRORS as error:
            known = isinstance(error, RaypipeError)
            status = HTTPStatus.BAD_REQUEST if known else HTTPStatus.INTERNAL_SERVER_ERROR
            line = " ".join(str(error).split())[:500]
            self._refuse(status, line if known else f"{type(error).__name__}: {line}")
            return
        self._send(HTTPStatus.OK, answer, "application/json")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # a body may be left unread
        self._send(status, json.dumps({"error": reason}).encode(), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal shows the address, and requests would push it away."""
