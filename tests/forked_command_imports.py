"""Imports of the process that `forked_command` forks from."""

from __future__ import annotations

from pathlib import Path

from raypipe.distributed.fork_server import import_with

import_with({}, str(Path(__file__).resolve().parents[1]))
