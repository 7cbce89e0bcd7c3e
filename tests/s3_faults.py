"""A proxy on loopback in front of a real S3 server that spoils some requests: scripted one by one, or drawn by a seed.

slow: the answer comes late, byte by byte at first. 503: refused, as S3 does when it wants less. reset: the connection
breaks in the middle of the body (of the request, or of the answer where it has one). truncate: the answer ends early.
short: it ends early and says that it was to be so short. flip: one byte of it is another. lost: what was asked is done,
and nobody hears of it. Scripted only: gone: an upload in parts is not known, as an endpoint says that has completed it.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("slow", "503", "reset", "truncate", "short", "flip", "lost")
SLOW_S = 0.3
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_NO_SUCH_UPLOAD = b"<Error><Code>NoSuchUpload</Code><Message>The upload does not exist.</Message></Error>"


class S3Faults:
    """`url` leads through the proxy to `upstream`. With neither script nor share nothing is spoiled.

    Args:
        script: faults of the next requests in turn, "" for none; later ones are not spoiled.
        share, seed, kinds: instead of a script, this share of all requests gets one of the kinds.
        methods: requests of other methods pass, and take nothing from the script.
        unknown_headers: refused as not implemented, as by an endpoint that does not know them.
        dropped_headers: taken out, as by an endpoint that does not mind them.
    """

    def __init__(
        self,
        upstream: str,
        script: Iterable[str] = (),
        share: float = 0.0,
        seed: int = 0,
        kinds: tuple[str, ...] = FAULTS,
        methods: tuple[str, ...] = ("GET", "PUT", "POST"),
        unknown_headers: tuple[str, ...] = (),
        dropped_headers: tuple[str, ...] = (),
    ):
        parts = urlsplit(upstream)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)
        self.share, self.kinds, self.methods, self.unknown = share, kinds, methods, unknown_headers
        self.dropped = {name.lower() for name in dropped_headers}
        self.done: Counter[str] = Counter()  # of each kind, how often
        self._script, self._rng, self._lock = list(script), random.Random(seed), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"faults": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> S3Faults:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def script(self, *faults: str) -> None:
        with self._lock:
            self._script = list(faults)

    def spoil(self, share: float, seed: int) -> None:
        """From now on this share of all requests, drawn anew by `seed`."""
        with self._lock:
            self.share, self._rng = share, random.Random(seed)

    def next_fault(self, method: str) -> str:
        with self._lock:
            if method not in self.methods:
                return ""
            if self._script:
                fault = self._script.pop(0)
            else:
                fault = self._rng.choice(self.kinds) if self._rng.random() < self.share else ""
            self.done[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    faults: S3Faults
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # of a client that has gone, or that we have left
            self.close_connection = True

    def _pass_on(self) -> None:
        fault = self.faults.next_fault(self.command)
        size = int(self.headers.get("Content-Length", 0))
        if fault == "reset" and size:
            self.rfile.read(size // 2)
            self._break()
            return
        body = self.rfile.read(size)
        if fault == "503":
            self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
            return
        if fault == "gone":
            self._answer(404, [("Content-Type", "application/xml")], _NO_SUCH_UPLOAD)
            return
        if known := [name for name in self.faults.unknown if name in self.headers]:
            told = f"<Error><Code>NotImplemented</Code><Message>{known[0]}</Message></Error>".encode()
            self._answer(501, [("Content-Type", "application/xml")], told)
            return
        upstream = HTTPConnection(self.faults.host, self.faults.port, timeout=60)
        try:
            headers_up = {
                name: value for name, value in self.headers.items() if name.lower() not in self.faults.dropped
            }
            upstream.request(self.command, self.path, body, headers_up)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        if fault == "lost":
            self._break()
            return
        hop = ("connection", "transfer-encoding", "content-length", "date", "server")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in hop]
        length = int(answer.getheader("Content-Length") or 0) if self.command == "HEAD" else len(content)
        self._answer(answer.status, headers, content, fault, length)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, fault: str = "", length: int | None = None
    ) -> None:
        half = len(content) // 2
        if fault == "flip" and content:
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        if fault == "short":
            content, length = content[:half], half
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "slow":
            time.sleep(SLOW_S)
            for at in range(min(20, len(content))):
                self.wfile.write(content[at : at + 1])
                self.wfile.flush()
            content = content[20:]
        if fault in ("reset", "truncate"):
            self.wfile.write(content[:half])
            self.wfile.flush()
            self._break(politely=fault == "truncate")
            return
        self.wfile.write(content)

    def _break(self, politely: bool = False) -> None:
        """Ends the connection: with a reset, or as if all had been said."""
        self.close_connection = True
        if not politely:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass
