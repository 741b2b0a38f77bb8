"""Exceptions as messages: ERROR and CLOSING.

An exception travels as three texts: class, message, and the traceback of its cause.
"""

from __future__ import annotations

import struct
import traceback
from collections.abc import Callable

from aioinfer.errors import (
    InferenceError,
    InvalidRequestError,
    ModelError,
    QueueFullError,
    ServerClosedError,
    ServerDiedError,
    WeightSyncError,
)
from aioinfer.transports.wire.frames import Buffer, Cursor, Kind, frame

MAX_TEXT = 1 << 16  # characters of each text of an error


class RemoteTraceback(Exception):
    """The cause of an exception that came from another process: its traceback, as text."""


_ERROR = struct.Struct("<QIII4x")
_REBUILT: dict[str, type[Exception]] = {
    found.__name__: found
    for found in (
        *(InferenceError, InvalidRequestError, ModelError),
        *(QueueFullError, ServerClosedError, ServerDiedError, WeightSyncError),
        *(TimeoutError, ValueError, TypeError, RuntimeError),
    )
}


def encode_error(request_id: int, error: BaseException, kind: Kind = Kind.ERROR) -> bytes:
    """An ERROR, or a CLOSING (whose request id says nothing). Whatever the error, this works."""
    texts = [_text(make, error) for make in (_class_of, str, _cause_of)]
    return frame(kind, _ERROR.pack(request_id, *map(len, texts)), *texts)


def _text(make: Callable[[BaseException], str], error: BaseException) -> bytes:
    try:
        text = make(error)
        if len(text) > MAX_TEXT:
            half = MAX_TEXT // 2 - 50
            left_out = f"\n[... {len(text) - 2 * half} characters left out ...]\n"
            text = text[:half] + left_out + text[-half:]
        return text.encode("utf-8", "backslashreplace")
    except Exception as fault:  # it is the policy's exception: its __str__ may do anything
        return f"<{type(error).__name__} failed to say: {type(fault).__name__}>".encode()


def _class_of(error: BaseException) -> str:
    found = type(error)
    known = found is _REBUILT.get(found.__name__)
    return found.__name__ if known else f"{found.__module__}.{found.__qualname__}"


def _cause_of(error: BaseException) -> str:
    cause = error.__cause__
    return "" if cause is None else "".join(traceback.format_exception(cause))


def decode_error(body: Buffer) -> tuple[int, Exception]:
    """The request id and a fresh exception, of the class that it had if we know that class."""
    cursor = Cursor(body)
    request_id, *lengths = cursor.take(_ERROR)
    name, message, trace = [cursor.text(length) for length in lengths]
    cursor.end()
    known = _REBUILT.get(name)
    error = InferenceError(f"{name}: {message}") if known is None else known(message)
    if trace:
        error.__cause__ = RemoteTraceback(trace)
    return request_id, error
