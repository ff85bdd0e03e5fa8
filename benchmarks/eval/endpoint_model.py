"""A server with the OpenAI API as the model of an evaluation: a few threads, each with one connection."""

from __future__ import annotations

import contextlib
import difflib
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_rt.benchmarks.eval.http_connection import Connection, ConnectionFailedError, Response, parse_url
from qwen_rt.benchmarks.eval.models import Job, Reply, Sampling
from qwen_rt.benchmarks.eval.prompts import Kind
from qwen_rt.errors import EndpointError, QwenRtError, UsageError

__all__ = ["KEY_VARIABLE", "EndpointModel"]

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ATTEMPTS = 6
MAX_WAIT_S = 60.0
BACKOFF_S = 1.0
"""Before the second attempt, doubled for each further one: half a minute in all."""

_FIRST_TIMEOUT_S = 15.0
_RETRIED = (408, 409, 425, 429)


class EndpointModel:
    """Answers with a server.

    Args:
        url: Where its API begins, such as `http://127.0.0.1:8000/v1`.
        sampling: How tokens are chosen.
        model: The server's name of the model; None for the only one that it serves.
        concurrency: Requests at once.
        timeout_s: For one answer.
        environment: Where `OPENAI_API_KEY` is looked up; None for this process's.

    Raises:
        UsageError: A value that cannot be used, or a model that the server does not have.
        EndpointError: The server cannot be reached, or refuses the key.
    """

    def __init__(
        self,
        url: str,
        sampling: Sampling,
        *,
        model: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 600.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if not 1 <= concurrency <= 1024:
            raise UsageError(f"concurrency={concurrency}", "1 to 1024")
        if not 0 < timeout_s <= 86_400:
            raise UsageError(f"timeout={timeout_s}", "seconds above 0, a day at most")
        self._url = parse_url(url)
        self._sampling = sampling
        self._concurrency, self._timeout_s = concurrency, timeout_s
        self._key = _read_key(os.environ if environment is None else environment)
        self._ended = threading.Event()
        self._open: list[Connection] = []
        self._model = self._choose(model)

    @property
    def default_format(self) -> Kind:
        """`instruct`: the server knows the chat template."""
        return "instruct"

    def describe(self) -> dict[str, Any]:
        """URL and name of the model."""
        return {"endpoint": self._url.text, "model": self._model}

    def check(self, jobs: Sequence[Job]) -> None:
        """Nothing to check: only the server knows how long a prompt may be."""

    def answer(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Reply]]:
        """Answer prompts; yields each answer as soon as it is there.

        Raises:
            EndpointError: The server refuses a request, answers nonsense, or is in trouble after `MAX_ATTEMPTS`
                attempts. Answers that were there before have been yielded.
        """
        todo: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Job, Reply] | BaseException] = queue.SimpleQueue()
        self._ended.clear()
        self._open = [self._connect(self._timeout_s) for _ in range(min(self._concurrency, len(jobs)))]
        threads = [
            threading.Thread(target=self._work, args=(connection, todo, done), daemon=True) for connection in self._open
        ]
        for thread in threads:
            thread.start()
        try:
            for job in jobs:
                todo.put(job)
            for _ in jobs:
                result = done.get()
                if isinstance(result, BaseException):
                    yield from _what_is_there(done)
                    raise result
                yield result
        finally:
            self._ended.set()
            for _ in threads:
                todo.put(None)
            for connection in self._open:
                connection.abort()
            until = time.monotonic() + 1.0
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))  # one that is still connecting ends by itself

    def close(self) -> None:
        """Nothing is held between two calls of `answer`."""

    def _connect(self, timeout_s: float) -> Connection:
        return Connection(self._url, timeout_s, self._key)

    def _choose(self, model: str | None) -> str:
        """Return the model to ask for; tells at once if the server is not there, or has others only."""
        connection = self._connect(min(self._timeout_s, _FIRST_TIMEOUT_S))
        try:
            response = connection.request("models")
        except ConnectionFailedError as trouble:
            raise self._error(str(trouble), "a running server", "start it, or check --endpoint") from None
        finally:
            connection.close()
        if response.status in (401, 403):
            raise self._refusal(response)
        served = _names(response) if response.status == 200 else []
        if model is None:
            if len(served) == 1:
                return served[0]
            what = f"{self._url.text} serves {', '.join(sorted(served)[:10]) or 'models that it does not name'}"
            raise UsageError(what, "one model", "pass --model NAME")
        if served and model not in served:
            near = difflib.get_close_matches(model, served[:1000], n=3, cutoff=0.0)
            raise UsageError(f"model={model}: {self._url.text} does not serve it", " or ".join(near), "see --model")
        return model

    def _work(self, connection: Connection, todo: Any, done: Any) -> None:
        """Answer until there is nothing to do; what goes wrong is for the one who waits for the answers."""
        try:
            while not self._ended.is_set() and (job := todo.get()) is not None:
                done.put((job, self._ask(connection, job)))
        except BaseException as error:
            done.put(error)
        finally:
            connection.close()

    def _ask(self, connection: Connection, job: Job) -> Reply:
        path, body = self._request(job)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            wait_s = min(MAX_WAIT_S, BACKOFF_S * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25)
            try:
                response = connection.request(path, body)
                if response.status == 200:
                    return self._read(response, job)
                error = self._refusal(response, job)
                if response.status < 500 and response.status not in _RETRIED:
                    raise error
                if response.retry_after_s is not None:
                    wait_s = min(MAX_WAIT_S, response.retry_after_s)
            except ConnectionFailedError as trouble:
                error = self._error(f"{_place(job)}: {trouble}", fix="see the server, then rerun to go on")
                if not trouble.may_pass:
                    raise error from None
            if attempt < MAX_ATTEMPTS and self._ended.wait(wait_s):
                break
        raise error

    def _request(self, job: Job) -> tuple[str, dict[str, Any]]:
        sampling = self._sampling
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if job.seed is not None:
            body["seed"] = job.seed
        if job.prompt.stop:
            body["stop"] = list(job.prompt.stop)
        if job.prompt.is_chat:
            return "chat/completions", body | {"messages": job.prompt.messages}
        return "completions", body | {"prompt": job.prompt.text}

    def _read(self, response: Response, job: Job) -> Reply:
        document = response.json()
        choices = document.get("choices") if isinstance(document, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise self._nonsense(response, job, "no choices[0]")
        if job.prompt.is_chat:
            message = choice.get("message")
            # A model that says nothing has content null.
            text = (message.get("content") or "") if isinstance(message, dict) else None
        else:
            text = choice.get("text")
        if not isinstance(text, str):
            raise self._nonsense(response, job, f"no {'message.content' if job.prompt.is_chat else 'text'}")
        usage = document.get("usage")
        num_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 0 <= num_tokens < 1 << 31:
            num_tokens = None
        reason = choice.get("finish_reason")
        return Reply(text, num_tokens, reason[:40] if isinstance(reason, str) else "unknown")

    def _error(self, what: str, expected: str = "", fix: str = "") -> EndpointError:
        return EndpointError(f"{self._url.text}: {what}", expected, fix)

    def _refusal(self, response: Response, job: Job | None = None) -> QwenRtError:
        """What to say of a status other than 200."""
        said = response.message()
        what = f"HTTP status {response.status}" + (f" ({said})" if said else "")
        if job is not None:
            what = f"{_place(job)}: {what}"
        if response.status in (401, 403):
            return self._error(what, fix=f"set {KEY_VARIABLE} to a key that the server takes")
        if response.status == 404:
            return self._error(what, fix="check --endpoint, which ends in /v1 for most servers, and --model")
        return self._error(what, fix="see the server, then rerun to go on")

    def _nonsense(self, response: Response, job: Job, what: str) -> EndpointError:
        shown = response.text[:80]
        return self._error(f"{_place(job)}: the reply has {what}: {shown!r}", "the OpenAI API", "check --endpoint")


def _what_is_there(done: Any) -> Iterator[tuple[Job, Reply]]:
    """The answers that have come, when an error ends everything."""
    with contextlib.suppress(queue.Empty):
        while True:
            result = done.get_nowait()
            if not isinstance(result, BaseException):
                yield result


def _place(job: Job) -> str:
    return f"problem {job.key[1]} of {job.key[0]}"


def _names(response: Response) -> list[str]:
    """The models of `GET /models`; empty where the reply is something else."""
    document = response.json()
    data = document.get("data") if isinstance(document, dict) else None
    rows = data if isinstance(data, list) else []
    return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


def _read_key(environment: Mapping[str, str]) -> str | None:
    """The key, without ever showing it."""
    key = environment.get(KEY_VARIABLE, "").strip()
    if not key:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{KEY_VARIABLE} holds a character that no key has", "printable ASCII without spaces")
    return key
