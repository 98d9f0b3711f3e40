"""Two sides meet over a TCP socket, as ibv_rc_pingpong's do: each tells the other its queue pair and whatever words it likes
(addresses, keys), connects, and goes on when both are ready.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from dmapath.errors import DmaValueError, VerbsError
from dmapath.verbs.queue import Qp, QpInfo

__all__ = ["accept", "dial", "meet", "tell"]


def tell(sock: socket.socket, words: dict[str, Any]) -> dict[str, Any]:
    """Send words (plain data) and get the other side's: one line of JSON each way, which also is a barrier.

    Raises VerbsError (ECONNRESET) where the other side goes away, DmaValueError where it says something else.
    """
    line = bytearray()
    try:
        sock.sendall(json.dumps(words).encode() + b"\n")
        while not line.endswith(b"\n"):
            byte = sock.recv(1)  # no more than the line: what follows is not ours
            if not byte:
                raise ConnectionResetError
            line += byte
    except ConnectionError:
        raise VerbsError("the other side closed the connection", errno=104, argument="sock", value=sock.fileno()) from None
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise DmaValueError("a line of JSON with an object", argument="sock", value=bytes(line[:80]))
    return answer


def meet(sock: socket.socket, qp: Qp, words: dict[str, Any] | None = None, **how: Any) -> dict[str, Any]:
    """Connect a queue pair with the other side's over a socket; returns the other side's words. ``how`` goes to
    Qp.connect.
    """
    answer = tell(sock, {"qp": qp.info.to_json(), "words": words or {}})
    try:
        remote, theirs = QpInfo.from_json(answer["qp"]), dict(answer["words"])
    except (KeyError, TypeError, ValueError):
        raise DmaValueError('an object with "qp" and "words"', argument="sock", value=answer) from None
    qp.connect(remote, **how)
    tell(sock, {})  # neither posts before both are ready to receive
    return theirs


def accept(port: int, *, host: str = "", timeout: float = 60.0) -> socket.socket:
    """Wait for the other side on a TCP port; a connected socket. TimeoutError (OSError) where nobody comes."""
    with socket.create_server((host, port)) as server:
        server.settimeout(timeout)
        sock, _ = server.accept()
    sock.settimeout(timeout)
    return sock


def dial(host: str, port: int, *, timeout: float = 60.0) -> socket.socket:
    """Connect to the other side, which may not be listening yet."""
    end = time.monotonic() + timeout
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic()))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
            continue
        sock.settimeout(timeout)
        return sock
