"""The server answers its own page only."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from raypipe.cli import cli
from raypipe.runs.run import Run
from raypipe.view.answers import Answers
from raypipe.view.server import TOKEN_HEADER, ViewServer


@pytest.fixture
def server(viewed: Callable[..., Run], tmp_path: Path) -> Iterator[ViewServer]:
    with ViewServer(Answers(viewed(), never=str(tmp_path / "never.txt"))) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(
    server: ViewServer, path: str, *, method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, Any, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {TOKEN_HEADER: server.token, **named})
    answer = connection.getresponse()
    data = answer.read()
    kind = answer.headers["Content-Type"] or ""
    connection.close()
    return answer.status, json.loads(data) if "json" in kind else data, answer


def test_it_listens_on_the_loopback_interface_only(server: ViewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address.endswith(f"/#token={server.token}") and len(server.token) >= 32


def test_without_the_token_nothing_is_told(server: ViewServer, tmp_path: Path) -> None:
    mark = json.dumps({"rows": [1], "mark": "never"})
    for path in ("run", "samples?sort=highest", "images?rows=1", "sample?row=1", "mark"):
        for token in ("", "wrong", "\xe4" * 32):
            method, body = ("POST", mark) if path == "mark" else ("GET", None)
            status, value, _ = ask(
                server, f"/api/{path}", method=method, body=body, X_Raypipe_Token=token
            )
            assert status == 403 and "token" in value["error"]
    assert not (tmp_path / "never.txt").exists()


def test_other_names_of_this_machine_are_refused(server: ViewServer) -> None:
    for host, expected in (
        ("127.0.0.1:1", 200),  # a tunnel from another port
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("[", 403),
        ("", 403),
    ):
        for path in ("/", "/api/run"):
            assert ask(server, path, Host=host)[0] == expected, (host, path)


def test_the_page_may_load_and_run_nothing_else(server: ViewServer) -> None:
    for path in ("/", "/view.js", "/view.css", "/api/run", "/nothing"):
        status, _, answer = ask(server, path)
        assert status == (404 if path == "/nothing" else 200)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert b"<script>" not in ask(server, "/")[1]


def test_no_other_file_is_served(server: ViewServer) -> None:
    for path in ("/../server.py", "/view/../../pyproject.toml", "//etc/passwd", "/view.html"):
        assert ask(server, path)[0] == 404


def test_what_is_wrong_is_one_line(server: ViewServer) -> None:
    assert ask(server, "/api/samples?label=x")[1] == {"error": "label: 'x' is not a number"}
    assert ask(server, "/api/sample?row=999999")[0] == 400
    assert ask(server, "/api/mark", method="POST", body="{")[0] == 500
    assert ask(server, "/api/mark", method="POST", body="[]")[0] == 400
    assert ask(server, "/api/mark", method="POST", Content_Length="99999999")[0] == 413
    assert ask(server, "/api/run", method="POST", body="{}")[0] == 404
    assert ask(server, "/api/run")[0] == 200


def test_a_mark_is_written(server: ViewServer, tmp_path: Path) -> None:
    status, value, _ = ask(
        server, "/api/mark", method="POST", body=json.dumps({"rows": [1], "mark": "never"})
    )
    assert (status, value["marked"]) == (200, 1)
    assert (tmp_path / "never.txt").read_text() == "part-0#2\n"


def test_the_command_prints_the_address_and_ends_with_ctrl_c(
    viewed: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(server: ViewServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ViewServer, "serve_forever", interrupted)
    run = viewed()
    done = CliRunner().invoke(cli, ["view", run.uri])
    assert done.exit_code == 0 and "http://127.0.0.1:" in done.output and "#token=" in done.output
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        refused = CliRunner().invoke(cli, ["view", run.uri, "--port", str(port)])
    assert str(refused.exception) == f"port {port}: Address already in use; choose another --port"
