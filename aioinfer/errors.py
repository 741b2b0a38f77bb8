"""The exceptions of the library, one tree.

::

    InferenceError
    ├── ServerClosedError     the server was closed (by you); start it again
    ├── ServerDiedError       the server went away without being asked to
    ├── QueueFullError        no room, and the caller asked not to wait for it
    ├── InvalidRequestError   this request cannot be served (also a ValueError)
    ├── ModelError            the policy failed on this request; see ``__cause__``
    └── WeightSyncError       weights that do not fit, or that are too old to be served

A deadline that passes is the built-in :class:`TimeoutError`; a wrong argument is a
:class:`ValueError` or :class:`TypeError`. Every waiting caller gets an exception
object of its own: exceptions are never shared, so tracebacks do not mix.
"""

from __future__ import annotations

__all__ = [
    "InferenceError",
    "InvalidRequestError",
    "ModelError",
    "QueueFullError",
    "ServerClosedError",
    "ServerDiedError",
    "WeightSyncError",
]


class InferenceError(Exception):
    """Base class of everything this library raises about serving a request."""


class ServerClosedError(InferenceError):
    """The server is closed, closing, or was never started."""


class ServerDiedError(InferenceError):
    """The server stopped without being closed; ``__cause__`` says why where it is known."""


class QueueFullError(InferenceError):
    """The queue holds ``max_queue_size`` rows and the request was sent with ``block=False``."""


class InvalidRequestError(InferenceError, ValueError):
    """The request cannot be served as it is; the message says what was given and allowed."""


class ModelError(InferenceError):
    """The policy raised, or returned something that is not an answer to the request.

    ``__cause__`` is the exception of the policy, with its traceback, where it raised one.
    """


class WeightSyncError(InferenceError):
    """Weights were refused, or those in service are older than the server may serve.

    Refused weights change nothing: what was served goes on being served.
    """
