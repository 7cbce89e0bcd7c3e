"""Between an S3 client and its server: passes requests on, and now and then does what networks and servers do.

A `StorageFault` strikes the first request of its method at or after a number of requests, so many times in a row:

| kind            | what the client sees                                                                  |
|-----------------|---------------------------------------------------------------------------------------|
| refused         | 503 SlowDown, at once; nothing was stored                                              |
| slow            | the answer, seconds late                                                               |
| upload torn     | the connection breaks off in the middle of the body; nothing was stored                |
| download torn   | the connection breaks off in the middle of the answer                                  |
| answer lost     | the connection breaks off after the server has done all that it was asked for          |
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = {"refused": "PUT", "slow": "PUT", "upload torn": "PUT", "download torn": "GET", "answer lost": "PUT"}
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HOP_BY_HOP = ("connection", "transfer-encoding", "expect", "keep-alive")


@dataclass
class StorageFault:
    """at: requests of this method that come first. times: how many in a row are struck. seconds: of `slow`."""

    id: str
    kind: str
    method: str
    at: int
    times: int = 1
    seconds: float = 0.0
    struck: list[float] = field(default_factory=list)  # when, seconds since the epoch


def draw_storage(seed: int, count: int, requests: int) -> list[StorageFault]:
    """Faults among about `requests` requests of each method. One in four outlasts a client's usual four attempts."""
    rng, plan = random.Random(seed), []
    for number in range(count):
        kind = rng.choice(list(KINDS))
        method = rng.choice(("PUT", "GET")) if kind in ("refused", "slow") else KINDS[kind]
        times = 1 if kind == "slow" else rng.choice((1, 1, 2, 6))
        at = rng.randrange(requests if method == "PUT" else max(2, requests // 4))
        plan.append(StorageFault(f"s{seed}-{number}", kind, method, at, times, rng.uniform(0.5, 3.0)))
    return plan


class FaultyProxy:
    """Listens on a free loopback port. `faults` may be set anew at any time; counting starts anew with them."""

    def __init__(self, upstream: str, faults: list[StorageFault] | None = None) -> None:
        self.upstream, self._lock = urlsplit(upstream).netloc, threading.Lock()
        self.faults: list[StorageFault] = []
        self.requests: dict[str, int] = {}
        self.set(faults or [])
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def set(self, faults: list[StorageFault]) -> None:
        with self._lock:
            self.faults, self.requests = faults, {}

    def next_fault(self, method: str) -> StorageFault | None:
        """Counts a request; the fault that strikes it, if one does."""
        with self._lock:
            number = self.requests.get(method, 0)
            self.requests[method] = number + 1
            for fault in self.faults:
                if fault.method == method and number >= fault.at and len(fault.struck) < fault.times:
                    fault.struck.append(time.time())
                    return fault
        return None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def _pass_on(self) -> None:
        fault = self.proxy.next_fault(self.command)
        kind = fault.kind if fault is not None else None
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "upload torn":
            self.rfile.read(length // 2)
            self._break_off()
            return
        body = self.rfile.read(length)
        if kind == "refused":
            self._answer(503, "Slow Down", [("Content-Type", "application/xml")], BUSY)
            return
        if fault is not None and kind == "slow":
            time.sleep(fault.seconds)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=120)
        try:
            upstream.request(self.command, self.path, body=body, headers=headers)
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        if kind == "answer lost":
            self._break_off()
            return
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP]
        self._answer(answer.status, answer.reason, kept, data, torn=kind == "download torn")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, torn: bool = False
    ) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        # What HEAD promises is the object's length, not that of the answer.
        length = {name.lower(): value for name, value in headers}.get("content-length", "")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if torn else body)
        if torn:
            self._break_off()

    def _break_off(self) -> None:
        """As a broken network does: no more bytes, and no polite end."""
        self.close_connection = True
        self.wfile.flush()
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass
