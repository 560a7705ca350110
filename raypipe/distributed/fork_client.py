"""Python of Ray workers that `fork_server` forks: pass the command on, and live as long as it.

Ray starts this file in place of Python, without the site packages: it starts in 20 ms. Arguments:
the socket of the server, then the command line of the worker. If the server is gone, this process
becomes the worker, as if there had been no server.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import sys


def forked(address: str, command: list[str]) -> socket.socket | None:
    """Return a connection that ends with the forked worker, or None if nothing was forked."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        request = {
            "command": command,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE),
            "raylet": os.getppid(),
        }
        content = json.dumps(request).encode("utf-8", "surrogateescape")
        connection.connect(address)
        socket.send_fds(connection, [struct.pack("!I", len(content))], [0, 1, 2])
        connection.sendall(content)
        return connection if connection.recv(1) else None
    except OSError:
        return None


if __name__ == "__main__":
    worker = forked(sys.argv[1], sys.argv[2:])
    if worker is None:
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
    for stream in (0, 1, 2):
        os.close(stream)  # the worker has copies: whoever reads them sees the end of the worker
    worker.recv(1)
