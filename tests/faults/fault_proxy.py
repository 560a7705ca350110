"""An HTTP proxy in front of a local server that disturbs a seeded share of the requests."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("slow-down", "reset", "lost", "stall", "truncate")
"""503 SlowDown; connection reset before the request is passed on; connection reset afterwards, so
that the answer is lost; no answer for `stall` seconds; an answer without its second half."""
ERRORS = {
    "slow-down": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (403, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
}


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on to `target` (http://host:port).

    Attributes
    ----------
    rate : float
        Share of the requests that are disturbed, each by one of `kinds`, drawn from `seed`.
    every : str
        Name in ERRORS with which every request is answered instead; "" for none.
    next : list of str
        Faults of the next requests, before any is drawn.
    found : Counter
        Number of faults of each kind.
    asked : int
        Number of requests.
    times : dict
        Times of each disturbed request and of its retries, in seconds, by method and path.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        target: str,
        rate: float = 0.0,
        seed: int = 0,
        kinds: tuple[str, ...] = KINDS,
        stall: float = 3.0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.target, self.rate, self.kinds, self.stall = (
            target.removeprefix("http://"),
            rate,
            kinds,
            stall,
        )
        self.every, self.next, self.asked = "", list[str](), 0
        self.found: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, request: str, readable: bool) -> str:
        """Choose the fault of a request. Only an answer with content can be truncated."""
        with self._lock:
            self.asked += 1
            draw, kind = self._random.random(), self._random.choice(self.kinds)
            if self.every:
                kind = self.every
            elif self.next:
                kind = self.next.pop(0)
            elif draw >= self.rate:
                kind = ""
            if kind == "truncate" and not readable:
                kind = "slow-down"
            if kind:
                self.found[kind] += 1
            if kind or request in self.times:
                self.times.setdefault(request, []).append(time.monotonic())
            return kind

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors of clients that time out and close their connection."""


class _Relay(BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.fault(f"{self.command} {self.path}", self.command == "GET")
        if kind in ERRORS:
            status, code, message = ERRORS[kind]
            error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            text = f'<?xml version="1.0"?>{error}'.encode()
            self._answer(
                status,
                [("Content-Type", "application/xml")],
                b"" if self.command == "HEAD" else text,
            )
        elif kind == "stall":
            time.sleep(self.server.stall)
            self._reset()
        elif kind == "reset":
            self._reset()
        else:
            connection = http.client.HTTPConnection(self.server.target)
            connection.request(
                self.command,
                self.path,
                body,
                {key: value for key, value in self.headers.items() if key != "Host"},
            )
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if kind == "lost":
                self._reset()
                return
            self._answer(answer.status, answer.getheaders(), content, cut=kind == "truncate")

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False
    ) -> None:
        length = {key.lower(): value for key, value in headers}.get(
            "content-length", str(len(content))
        )
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in {
                "connection",
                "transfer-encoding",
                "content-length",
                "server",
                "date",
            }:
                self.send_header(key, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _relay

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def standing_before(
    target: str, rate: float = 0.0, seed: int = 0, kinds: tuple[str, ...] = KINDS
) -> Iterator[FaultProxy]:
    """Run a proxy during the `with` block."""
    proxy = FaultProxy(target, rate, seed, kinds)
    thread = threading.Thread(
        target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
