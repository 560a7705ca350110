"""Downloads of published weights fail at once, in one line, where there is no network."""

from __future__ import annotations

import http.server
import logging
import socket
import sys
import threading
import types
import warnings
from collections.abc import Iterator

import pytest

from raypipe.proxies.downloads import from_hub, unreachable
from raypipe.proxies.library_warnings import no_warnings


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers every request with 501."""
    running = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    running.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture
def closed() -> str:
    """The address of a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def _hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, offline: bool = False) -> types.ModuleType:
    hub = types.ModuleType("huggingface_hub")
    hub.constants = types.SimpleNamespace(  # type: ignore[attr-defined]
        ENDPOINT=endpoint, HF_HUB_OFFLINE=offline
    )
    hub.errors = types.SimpleNamespace(  # type: ignore[attr-defined]
        LocalEntryNotFoundError=type("LocalEntryNotFoundError", (FileNotFoundError,), {}),
        OfflineModeIsEnabled=type("OfflineModeIsEnabled", (ConnectionError,), {}),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_any_answer_of_a_server_counts(server: str, closed: str) -> None:
    assert unreachable(f"{server}/some/file") == ""
    assert unreachable(f"{closed}/some/file") == f"{closed} cannot be reached: Connection refused"


def test_without_a_network_the_cache_of_the_hub_is_used_alone(
    closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _hub(monkeypatch, closed)
    with from_hub():
        assert hub.constants.HF_HUB_OFFLINE is True
    with pytest.raises(OSError, match=rf"^{closed} cannot be reached: Connection ref"), from_hub():
        try:
            raise hub.errors.LocalEntryNotFoundError("the cache lacks the file")
        except OSError as error:  # as libraries hide it
            raise RuntimeError("no file") from error
    with pytest.raises(ValueError, match="damaged"), from_hub():
        raise ValueError("damaged")
    assert hub.constants.HF_HUB_OFFLINE is False


def test_with_a_network_the_hub_is_used_as_it_is(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _hub(monkeypatch, server)
    with pytest.raises(hub.errors.LocalEntryNotFoundError), from_hub():
        assert hub.constants.HF_HUB_OFFLINE is False
        raise hub.errors.LocalEntryNotFoundError("no such model")


def test_the_choice_to_stay_offline_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _hub(monkeypatch, "http://not.asked.invalid", offline=True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"), from_hub():
        raise hub.errors.OfflineModeIsEnabled
    assert hub.constants.HF_HUB_OFFLINE is True


def test_a_library_neither_prints_nor_changes_the_logs_of_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with no_warnings():
        logging.basicConfig()
        logging.getLogger("library").error("retrying")
        warnings.warn("a mismatch", UserWarning, stacklevel=1)
    assert logging.root.handlers == []
    assert capsys.readouterr() == ("", "")
