"""An OpenAI-compatible server as the model, a good one and hostile ones; all of it in this process."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks.eval import endpoint_model, http_connection
from qwen_rt.benchmarks.eval.endpoint_model import EndpointModel
from qwen_rt.benchmarks.eval.http_connection import parse_url
from qwen_rt.benchmarks.eval.models import Job, Sampling
from qwen_rt.benchmarks.eval.prompts import Prompt
from qwen_rt.errors import EndpointError, UsageError

from .kit import Answered, Asked, chat_reply, right, serving

KEY = "sk-secret-0123456789abcdef"


def _jobs(num: int, **more: Any) -> list[Job]:
    fields: dict[str, Any] = {"is_chat": True} | more
    return [Job(("d", str(i), 0), Prompt(f"What is {i} + 1?", **fields), None) for i in range(num)]


def test_a_chat_request_to_the_letter() -> None:
    sampling = Sampling(0.7, 0.8, 64, 5)
    with serving(right) as server:
        model = EndpointModel(server.url + "/", sampling, environment={"OPENAI_API_KEY": f" {KEY}\n"})
        job = Job(("d", "1", 2), Prompt("What is 1 + 1?", True, ("\n\n",)), 77)
        ((same, reply),) = model.answer([job])
    assert same is job
    assert (reply.text, reply.num_tokens, reply.finish_reason) == ("It is \\boxed{2}.", 5, "stop")
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.body == {
        "model": "nano",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is 1 + 1?"},
        ],
        "max_tokens": 64,
        "temperature": 0.7,
        "top_p": 0.8,
        "seed": 77,
        "stop": ["\n\n"],
    }
    assert model.describe() == {"endpoint": server.url, "model": "nano"}


def test_a_completion_and_no_key() -> None:
    reply = Answered({"choices": [{"text": " 3", "finish_reason": "length"}], "usage": None})
    with serving(lambda asked: reply) as server:
        model = EndpointModel(server.url, Sampling(), model="nano", environment={})
        ((_, found),) = model.answer(_jobs(1, is_chat=False))
    assert (found.text, found.num_tokens, found.finish_reason) == (" 3", None, "length")
    (asked,) = server.asked
    assert asked.path == "/v1/completions"
    assert asked.headers["Authorization"] is None
    assert asked.body == {
        "model": "nano",
        "prompt": "What is 0 + 1?",
        "max_tokens": 2048,
        "temperature": 0.0,
        "top_p": 1.0,
    }


def test_requests_run_at_once_and_no_more_than_asked_for() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def handler(asked: Asked) -> Answered:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return right(asked)

    with serving(handler) as server:
        answered = dict(EndpointModel(server.url, Sampling(), concurrency=4).answer(_jobs(20)))
    assert {job.key[1]: reply.text for job, reply in answered.items()} == {
        str(i): f"It is \\boxed{{{i + 1}}}." for i in range(20)
    }
    assert 2 <= most <= 4
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_trouble_that_passes_is_tried_again(status: int) -> None:
    def handler(asked: Asked) -> Answered:
        busy = asked.number < 3
        return Answered({"error": {"message": "busy"}}, status, Retry_After="0") if busy else right(asked)

    with serving(handler) as server:
        assert len(list(EndpointModel(server.url, Sampling(), concurrency=1).answer(_jobs(2)))) == 2
    assert len(server.asked) == 5


def test_a_connection_that_the_server_closes_is_opened_again() -> None:
    with serving(lambda asked: Answered(right(asked).body, Connection="close")) as server:
        assert len(list(EndpointModel(server.url, Sampling(), concurrency=1).answer(_jobs(3)))) == 3


@pytest.mark.parametrize(
    ("reply", "attempts", "words"),
    [
        (
            Answered({"error": {"message": "out\nof \x1b[31mmemory"}}, 500),
            6,
            r"problem 0 of d: HTTP status 500 \(out of",
        ),
        (Answered(b"<html>" + b"x" * 5000, 503), 6, r"HTTP status 503 \(<html>x+\.\.\.\)"),
        (Answered({"error": "too long"}, 400), 1, r"HTTP status 400 \(too long\)"),
        (Answered({}, 401), 1, "HTTP status 401 .*set OPENAI_API_KEY"),
        (Answered({"object": "error", "message": "no such"}, 404), 1, r"HTTP status 404 \(no such\); check --endpoint"),
        (Answered(b"", 302, Location="http://elsewhere/"), 1, "HTTP status 302"),
        (Answered(b"not json"), 1, r"the reply has no choices\[0\]: 'not json'; expected the OpenAI API"),
        (Answered(b"[" * 100_000), 1, r"no choices\[0\]"),
        (Answered(b"\xff" * 500), 1, r"no choices\[0\]"),
        (Answered(b""), 1, r"no choices\[0\]"),
        (Answered([]), 1, r"no choices\[0\]"),
        (Answered({"choices": {}}), 1, r"no choices\[0\]"),
        (Answered({"choices": []}), 1, r"no choices\[0\]"),
        (Answered({"choices": [5]}), 1, r"no choices\[0\]"),
        (Answered({"choices": [{"text": "of the other kind"}]}), 1, "no message.content"),
        (Answered({"choices": [{"message": {"content": 5}}]}), 1, "no message.content"),
        (Answered({"choices": [{"message": {"content": ["a"]}}]}), 1, "no message.content"),
        (Answered(b"short", Content_Length="50", Connection="close"), 6, "problem 0 of d: "),
        (Answered(b"x" * 200_001), 1, "a reply of more than 200000 bytes"),
        (Answered(b"", X="y" * 70_000), 6, "got more than 65536 bytes"),
    ],
)
def test_hostile_replies_are_one_line(
    reply: Answered, attempts: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "MAX_REPLY_BYTES", 200_000)
    with serving(lambda asked: reply) as server:
        model = EndpointModel(server.url, Sampling(), concurrency=1)
        with pytest.raises(EndpointError, match=words) as found:
            list(model.answer(_jobs(1)))
    line = str(found.value)
    assert line.startswith(server.url)
    assert line.isprintable()
    assert len(line) < 700
    assert len(server.asked) == attempts


def test_odd_but_readable_replies() -> None:
    odd = [
        chat_reply(None),
        Answered(
            {"choices": [{"message": {"content": "x"}, "finish_reason": ["stop"]}], "usage": {"completion_tokens": -1}}
        ),
        Answered({"choices": [{"message": {"content": "\ud800"}}], "usage": [1]}),
        Answered(
            {
                "choices": [{"message": {"content": "y"}, "finish_reason": "z" * 99}],
                "usage": {"completion_tokens": True},
            }
        ),
    ]
    with serving(lambda asked: odd[asked.number]) as server:
        replies = [reply for _, reply in EndpointModel(server.url, Sampling(), concurrency=1).answer(_jobs(4))]
    assert [(r.text, r.num_tokens, r.finish_reason) for r in replies] == [
        ("", 5, "stop"),
        ("x", None, "unknown"),
        ("\ud800", None, "unknown"),
        ("y", None, "z" * 40),
    ]


def test_the_key_is_never_told() -> None:
    def handler(asked: Asked) -> Answered:
        if asked.number == 0:
            return chat_reply(f"your key is {KEY}")
        return Answered({"error": {"message": f"bad key {asked.headers['Authorization']}"}}, 403)

    environment = {"OPENAI_API_KEY": KEY}
    with serving(handler) as server:
        model = EndpointModel(server.url, Sampling(), concurrency=1, environment=environment)
        replies = model.answer(_jobs(2))
        assert next(replies)[1].text == "your key is ***"
        with pytest.raises(EndpointError, match=r"HTTP status 403 \(bad key Bearer \*\*\*\)"):
            next(replies)
        assert KEY not in json.dumps(model.describe())
    for bad in ("two words", "sch\u00f6n", "a\nb", "a\x00"):
        with pytest.raises(UsageError, match="OPENAI_API_KEY holds a character") as found:
            EndpointModel(server.url, Sampling(), environment={"OPENAI_API_KEY": bad})
        assert bad not in str(found.value)


def test_a_placeholder_for_a_key_stays_a_word() -> None:
    with serving(lambda asked: chat_reply("EMPTY set")) as server:
        model = EndpointModel(server.url, Sampling(), environment={"OPENAI_API_KEY": "EMPTY"})
        assert next(model.answer(_jobs(1)))[1].text == "EMPTY set"


def test_who_does_not_listen_is_told_of_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"/v1: Connection refused; expected a running server; start it"):
            EndpointModel(url, Sampling(), model="nano")


@pytest.mark.parametrize(
    "greeting", [b"", b"SSH-2.0-OpenSSH_9.7\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n12"]
)
def test_who_speaks_no_http(greeting: bytes) -> None:
    def greet() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(65536)
            client.sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(EndpointError, match="expected a running server"):
            EndpointModel(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", Sampling(), model="nano")
        thread.join()


def test_a_server_that_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_model, "MAX_ATTEMPTS", 2)
    ended = threading.Event()

    def handler(asked: Asked) -> Answered:
        ended.wait(20)
        return right(asked)

    with serving(handler) as server:
        model = EndpointModel(server.url, Sampling(), timeout_s=0.1)
        with pytest.raises(EndpointError, match=r"no answer within 0.1 s"):
            list(model.answer(_jobs(1)))
        ended.set()


def test_who_stops_asking_waits_for_nobody() -> None:
    ended = threading.Event()

    def handler(asked: Asked) -> Answered:
        if asked.number > 0:
            ended.wait(20)
        return right(asked)

    with serving(handler) as server:
        replies = EndpointModel(server.url, Sampling(), concurrency=3).answer(_jobs(9))
        next(replies)
        started = time.perf_counter()
        replies.close()  # type: ignore[attr-defined]
        assert time.perf_counter() - started < 5
        ended.set()


def test_answers_that_came_before_an_error_are_not_lost() -> None:
    gate = threading.Event()

    def handler(asked: Asked) -> Answered:
        if asked.first_number == 3:
            gate.wait(10)
            return Answered({}, 400)
        return right(asked)

    with serving(handler) as server:
        replies = EndpointModel(server.url, Sampling(), concurrency=4).answer(_jobs(4))
        found = {next(replies)[0].key[1] for _ in range(3)}
        gate.set()
        with pytest.raises(EndpointError, match="problem 3 of d: HTTP status 400"):
            next(replies)
    assert found == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("models", "model", "words"),
    [
        (("a", "b"), None, r"serves a, b; expected one model; pass --model NAME"),
        (Answered(b"nonsense"), None, "serves models that it does not name"),
        (Answered({}, 404), None, "serves models that it does not name"),
        (("nano",), "nan", "model=nan: .* does not serve it; expected nano"),
        (Answered({"data": [5, {"id": 7}, {"id": "x"}]}), "y", "expected x"),
    ],
)
def test_models_that_are_not_there(models: Any, model: str | None, words: str) -> None:
    with serving(right, models) as server, pytest.raises(UsageError, match=words):
        EndpointModel(server.url, Sampling(), model=model)


@pytest.mark.parametrize(
    "models", [Answered({}, 404), Answered(b"{"), Answered({"data": 5}), Answered({}, 500), ("m",)]
)
def test_a_server_that_lists_no_models_is_asked_all_the_same(models: Any) -> None:
    with serving(right, models) as server:
        assert EndpointModel(server.url, Sampling(), model="m").describe()["model"] == "m"


def test_a_key_that_is_refused_is_told_of_at_once() -> None:
    refused = Answered({"error": {"message": "who are you"}}, 401)
    words = r"401 \(who are you\); set OPENAI_API_KEY"
    with serving(right, refused) as server, pytest.raises(EndpointError, match=words):
        EndpointModel(server.url, Sampling(), model="m")
    assert server.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://host/v1",
        "http://",
        "http://user:hush@host/v1",
        "http://host:99999/v1",
        "http://host:x/v1",
        "http://host/v1?key=1",
        "http://host/v1#a",
        "http://host/v 1",
        "http://h\u00f6st/v1",
        "http://host/v1\r\nX: y",
        "http://[::1/v1",
        "",
    ],
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError, match="endpoint") as found:
        EndpointModel(url, Sampling())
    assert "hush" not in str(found.value)


def test_urls() -> None:
    found = parse_url("https://api.example.com/v1/")
    assert (found.text, found.host, found.port, found.path) == (
        "https://api.example.com/v1",
        "api.example.com",
        443,
        "/v1",
    )
    assert parse_url("http://[::1]:8000").host == "::1"
    for option, words in (({"concurrency": 0}, "concurrency=0"), ({"timeout_s": 0.0}, "timeout=0")):
        with pytest.raises(UsageError, match=words):
            EndpointModel("http://127.0.0.1:1/v1", Sampling(), **option)  # type: ignore[arg-type]


def test_sampling_is_checked(tmp_path: Path) -> None:
    for wrong in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"seed": -1},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]
