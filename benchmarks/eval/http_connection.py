"""One kept HTTP connection to a server that nobody has to trust: bounded in time and size, its key never shown."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import time
import urllib.parse
from dataclasses import dataclass
from typing import Any

from qwen_rt._version import __version__
from qwen_rt.errors import UsageError, one_line

__all__ = ["MAX_REPLY_BYTES", "Connection", "ConnectionFailedError", "Response", "Url", "parse_url"]

MAX_REPLY_BYTES = 16 << 20
"""Far beyond the text of a whole context."""

_BLOCK_BYTES = 1 << 16
_MAX_SAID_CHARS = 300
_SECRET_CHARS = 16


class ConnectionFailedError(Exception):
    """The connection failed, ended early or took too long.

    Args:
        what: What happened.
        may_pass: Whether another attempt may do.
    """

    def __init__(self, what: str, *, may_pass: bool = True) -> None:
        super().__init__(what)
        self.may_pass = may_pass


class _TooLargeError(Exception):
    """A reply beyond `MAX_REPLY_BYTES`."""


@dataclass(frozen=True)
class Url:
    """Where an API begins.

    Attributes:
        text: As the user wrote it, without a slash at the end.
        is_https: Whether it is encrypted.
        host: Name or address.
        port: Port.
        path: Path without a slash at the end; may be empty.
    """

    text: str
    is_https: bool
    host: str
    port: int
    path: str


def parse_url(text: str) -> Url:
    """Check the URL of an endpoint.

    Raises:
        UsageError: It is no http(s) URL, or has a user, a query or a fragment.
    """
    wanted = "such as http://127.0.0.1:8000/v1"
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"endpoint={text!r}", f"a URL of printable ASCII, {wanted}")
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"endpoint={text!r}: {error}", f"a URL {wanted}") from None
    if parts.username is not None or parts.password is not None:
        raise UsageError("endpoint with a user or password", f"a URL {wanted}", "put the key into OPENAI_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"endpoint={text!r}", f"a URL {wanted}")
    if parts.query or parts.fragment:
        raise UsageError(f"endpoint={text!r}", f"a URL without ? and #, {wanted}")
    is_https = parts.scheme == "https"
    return Url(text.rstrip("/"), is_https, parts.hostname, port or (443 if is_https else 80), parts.path.rstrip("/"))


@dataclass(frozen=True)
class Response:
    """A whole reply.

    Attributes:
        status: HTTP status.
        text: Body; what is no UTF-8 is replaced.
        retry_after_s: What the server asks to wait; None if it does not.
    """

    status: int
    text: str
    retry_after_s: float | None

    def json(self) -> Any:
        """Return the body as JSON; None if it is something else."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            return None

    def message(self) -> str:
        """Return what the server says of an error, on one line and bounded."""
        document = self.json()
        error = document.get("error", document) if isinstance(document, dict) else None
        said = error.get("message") if isinstance(error, dict) else error
        line = one_line(said if isinstance(said, str) else self.text)
        return line if len(line) <= _MAX_SAID_CHARS else f"{line[:_MAX_SAID_CHARS]}..."


class Connection:
    """One connection, kept between requests; used by one thread, aborted by another.

    Args:
        url: Where the API begins.
        timeout_s: For one request, from its start to the last byte of the reply.
        key: Sent as a bearer token; struck out of replies, should a server echo it.
    """

    def __init__(self, url: Url, timeout_s: float, key: str | None = None) -> None:
        self._url, self._timeout_s, self._key = url, timeout_s, key
        self._connection: http.client.HTTPConnection | None = None
        self._is_used = self._is_aborted = False

    def request(self, path: str, body: Any = None) -> Response:
        """Send a request and return the reply, whatever its status.

        Args:
            path: Below the URL's own.
            body: JSON data to post; None to get.

        Raises:
            ConnectionFailedError: The server cannot be reached, is too slow, or sends too much.
        """
        deadline = time.monotonic() + self._timeout_s
        try:
            try:
                return self._exchange(path, body, deadline)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                if not self._is_used or self._is_aborted:
                    raise
                self.close()  # a kept connection that the server has closed meanwhile
                return self._exchange(path, body, deadline)
        except TimeoutError:
            self.close()
            raise ConnectionFailedError(f"no answer within {self._timeout_s:g} s") from None
        except _TooLargeError:
            self.close()
            raise ConnectionFailedError(f"a reply of more than {MAX_REPLY_BYTES} bytes", may_pass=False) from None
        except ssl.SSLError as error:
            self.close()
            raise ConnectionFailedError(f"TLS: {error.reason or error}", may_pass=False) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ConnectionFailedError(self._strike(one_line(reason))[:_MAX_SAID_CHARS]) from None
        except BaseException:
            self.close()
            raise

    def abort(self) -> None:
        """End a request of another thread, and let none follow on a connection that is open."""
        self._is_aborted = True
        connection = self._connection
        sock = None if connection is None else connection.sock
        if sock is not None:
            with contextlib.suppress(OSError, ValueError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        connection, self._connection = self._connection, None
        self._is_used = False
        if connection is not None:
            connection.close()

    def _exchange(self, path: str, body: Any, deadline: float) -> Response:
        if self._connection is None:
            self._connection = self._open()
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json", "User-Agent": f"qwen-rt/{__version__}"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._connection.request("GET" if data is None else "POST", f"{self._url.path}/{path}", data, headers)
        response = self._connection.getresponse()
        blocks, size = [], 0
        while block := response.read1(_BLOCK_BYTES):
            blocks.append(block)
            size += len(block)
            if size > MAX_REPLY_BYTES:
                raise _TooLargeError
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:  # bytes that were promised and did not come
            raise http.client.IncompleteRead(b"", response.length)
        response.close()  # `read1` leaves it open behind the last byte, and the connection would not take a request
        self._is_used = True
        if response.will_close:
            self.close()
        text = b"".join(blocks).decode("utf-8", "replace")
        return Response(response.status, self._strike(text), _seconds(response.getheader("Retry-After")))

    def _open(self) -> http.client.HTTPConnection:
        url = self._url
        if url.is_https:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(url.host, url.port, timeout=self._timeout_s, context=context)
        return http.client.HTTPConnection(url.host, url.port, timeout=self._timeout_s)

    def _strike(self, text: str) -> str:
        """Take the key out of a text; a placeholder such as EMPTY is no secret, and may be a word of an answer."""
        secret = self._key if self._key is not None and len(self._key) >= _SECRET_CHARS else None
        return text if secret is None else text.replace(secret, "***")


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; a date counts as none."""
    return float(header) if header is not None and header.isascii() and header.isdigit() and len(header) < 10 else None
