"""A judge of words as an OpenAI-compatible server in this process: what it is asked, it can tell, whatever was trained.

It answers yes or no alone: a text shows an explanation as far as it holds the explanation's words.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PARTS = re.compile(r"\w+|[^\w\s]")
_ASKED = re.compile(r"begins\.\n(.*)\nText \d+ ends\.\n.* show this: (.*)\? Answer Yes or No\.$", re.DOTALL)


def log_odds(text: str, explanation: str) -> float:
    """By whole words and signs; a lexical explanation names what tells most of its latent first."""
    held = set(_PARTS.findall(text.lower()))
    found = [part in held for part in _PARTS.findall(explanation.lower()) if part != ","]
    return 4.0 * any(found[:1]) + sum(found[1:]) - 2.0


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay: a round asks a thousand questions
    wbufsize = -1  # an answer is one packet: a second one would wait for the first's receipt

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "words"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("chat/completions"):
            self._answer({"error": {"message": "chat alone"}}, status=400)
        elif not body.get("logprobs"):
            # No phrase: only the lexical candidates compete.
            choices = [{"index": i, "message": {"content": "?"}} for i in range(body["n"])]
            self._answer({"choices": choices, "usage": {}})
        else:
            asked = _ASKED.search(body["messages"][1]["content"])
            assert asked is not None
            top = [{"token": "Yes", "logprob": log_odds(*asked.groups())}, {"token": "No", "logprob": 0.0}]
            self._answer({"choices": [{"index": 0, "logprobs": {"content": [{"top_logprobs": top}]}}], "usage": {}})

    def _answer(self, answer: dict[str, Any], status: int = 200) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def word_judge() -> Iterator[str]:
    """Serves, and gives its base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
