"""Requests of JSON from a server that may be slow, broken or hostile."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from jaxpeft.errors import ConfigError, ExportError, shorten

_MOST_BYTES = 10_000_000


@dataclass(frozen=True)
class Answer:
    """An answer of a server.

    Attributes:
        status: its HTTP status.
        content: its body.
    """

    status: int
    content: bytes


def require_address(url: str) -> None:
    """Refuse an address that is none of a server.

    Raises:
        ConfigError: It is invalid, or has a password.
    """
    if "@" in url:
        raise ConfigError(
            f"--verify: must have no user and no password, is ***@{url.rpartition('@')[2]!r};"
            " forward the port of a server that needs them"
        )
    try:
        parts = urlsplit(url)
        _ = parts.port  # checks it
    except ValueError:
        parts = urlsplit("")
    plain = url.isprintable() and " " not in url and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ConfigError(
            f"--verify: must be the address of a server, such as http://localhost:8000, is {url!r}"
        )


def ask(server: str, url: str, body: Mapping[str, Any] | None, timeout: float) -> Answer:
    """Return the answer of a GET, or of a POST of a JSON body.

    Args:
        server: address of the server, for messages.
        url: address of the request.
        body: what to send; None for a GET.
        timeout: seconds for the whole request, from its connection to the end of the answer.

    Raises:
        ExportError: There is no answer in time, or none that is HTTP, or it is too large.
    """
    data = None if body is None else json.dumps(body).encode()
    # the scheme is checked
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    found: SimpleQueue[Answer | Exception] = SimpleQueue()
    # urllib's timeout is of a single read, so a thread reads; it ends with the process
    threading.Thread(target=_exchange, args=(request, timeout, found), daemon=True).start()
    try:
        answer = found.get(timeout=timeout)
    except Empty:
        answer = TimeoutError()
    if isinstance(answer, Exception):
        raise _failure(server, answer, timeout) from answer
    if len(answer.content) > _MOST_BYTES:
        raise ExportError(f"{server}: answered with more than {_MOST_BYTES:,} bytes")
    return answer


def _exchange(
    request: urllib.request.Request, timeout: float, found: SimpleQueue[Answer | Exception]
) -> None:
    """Put the answer of a request, or its error, into a queue."""
    try:
        try:
            opened: Any = urllib.request.urlopen(request, timeout=timeout)  # noqa: S310
        except urllib.error.HTTPError as error:
            opened = error  # which is an answer too
        with opened:
            found.put(Answer(opened.status, opened.read(_MOST_BYTES + 1)))
    except Exception as error:  # noqa: BLE001 - the other thread raises it
        found.put(error)


def _failure(server: str, error: Exception, timeout: float) -> Exception:
    """Return the error to raise in place of one of a request."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return ExportError(
            f"{server}: gives no whole answer in {timeout:g} s; is it busy? Set --timeout"
        )
    said = shorten(str(reason) or type(reason).__name__)
    if isinstance(error, HTTPException) and not isinstance(error, OSError):
        return ExportError(f"{server}: gives no valid HTTP answer ({type(error).__name__}: {said})")
    if isinstance(error, OSError | ValueError):
        return ExportError(f"{server}: cannot be reached ({said}); is the server running?")
    return error
