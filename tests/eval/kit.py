"""What the tests of evaluation share: datasets to write, a server in this process, and the command in it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qwen_rt.cli import main

Handler = Callable[["Asked"], "Answered"]

GSM8K = {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
MATH = {
    "problem": "What is $\\frac12+\\frac14$?",
    "level": "Level 2",
    "type": "Prealgebra",
    "solution": "It is $\\boxed{\\frac{3}{4}}$.",
}
MATH_500 = {
    "problem": "Solve $x^2=4$, $x>0$.",
    "solution": "So $x=\\boxed{2}$.",
    "answer": "2",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/7.json",
}
QWEN25 = {"idx": 3, "question": "1+1?", "answer": "2"}
OWN = {"id": "nano-1", "kind": "addition", "question": "Add 1 and 2", "answer": "3", "solution": "..."}


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    """A jsonl file; texts stand as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def sums(file: Path, num: int, **more: Any) -> Path:
    """Problems `i + 1`, i = 0, 1, …"""
    return write_rows(file, [{"question": f"What is {i} + 1?", "answer": str(i + 1), **more} for i in range(num)])


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The answers of a folder."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]


class Asked:
    """A request that came in: its number, path, headers and JSON body."""

    def __init__(self, number: int, path: str, headers: Any, body: Any) -> None:
        self.number, self.path, self.headers, self.body = number, path, headers, body

    @property
    def text(self) -> str:
        """The question."""
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]

    @property
    def first_number(self) -> int:
        """The i of the last `What is i + 1?`."""
        return int(self.text.rsplit("What is ", 1)[1].split(" ", 1)[0])


class Answered:
    """A reply: status, body (JSON data or bytes) and headers."""

    def __init__(self, body: Any, status: int = 200, **headers: str) -> None:
        self.body, self.status, self.headers = body, status, headers


def chat_reply(text: str | None, **more: Any) -> Answered:
    """A well-formed reply of a chat."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | more
    return Answered({"choices": [choice], "usage": {"completion_tokens": 5}})


def right(asked: Asked) -> Answered:
    """Answer a sum."""
    return chat_reply(f"It is \\boxed{{{asked.first_number + 1}}}.")


class Server:
    """A running server; `asked` are the requests for answers, in the order in which they came."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[Asked] = []


@contextmanager
def serving(handler: Handler, models: Any = ("nano",)) -> Iterator[Server]:
    """Serve on a free port: `GET /v1/models` names the models, `handler` makes every other reply."""
    lock = threading.Lock()

    class Http(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

        def do_GET(self) -> None:
            is_reply = isinstance(models, Answered)
            self._send(models if is_reply else Answered({"data": [{"id": name} for name in models]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked = Asked(len(server.asked), self.path, self.headers, body)
                server.asked.append(asked)
            self._send(handler(asked))

        def _send(self, reply: Answered) -> None:
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in ({"Content_Length": str(len(data))} | reply.headers).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

    class Threads(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has gone is no error."""

    http = Threads(("127.0.0.1", 0), Http)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def evaluate(*arguments: str | Path) -> int:
    """Run `qwen-rt eval` in this process, without progress."""
    return main(["eval", "--quiet", *map(str, arguments)])
