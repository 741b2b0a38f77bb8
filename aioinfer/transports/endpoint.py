"""Where a server listens on the network, and how both sides prove that they hold its secret.

The secret is 32 random bytes that travel inside the handle (a pickled transport or client) and
nowhere else. Before the first frame, three messages of fixed size are exchanged, the *handshake*:

1. client: what it speaks, and 32 random bytes;
2. server: 32 random bytes of its own, and an HMAC-SHA256 under the secret over both;
3. client: the time on its clock, its process id, and an HMAC over these and both.

Each side's bytes are new for every connection, so nothing that was recorded opens another one,
and the two HMACs start with different words, so neither side can be made to answer for the
other. What follows is not encrypted unless the connection runs over TLS.

Nothing in here does I/O.
"""

from __future__ import annotations

import dataclasses
import hmac
import os
import secrets
import ssl
import struct
from collections.abc import Callable

from aioinfer.transports.wire import PROTOCOL, WireError

SECRET_NBYTES = 32

TlsFactory = Callable[[ssl.Purpose], ssl.SSLContext]
"""Makes the context of one side: of a client for ``Purpose.SERVER_AUTH``, of a server for
``Purpose.CLIENT_AUTH``, as :func:`ssl.create_default_context` has it. It is called in every
process that connects, so it must be picklable; a context is not."""

_MAGIC = b"aioinfer"
_OPENING = struct.Struct("<8sI32s")
_CHALLENGE = struct.Struct("<32s32s")
_ANSWER = struct.Struct("<dI32s")
_CLAIM = struct.Struct("<dI")
OPENING_NBYTES = _OPENING.size
CHALLENGE_NBYTES = _CHALLENGE.size
ANSWER_NBYTES = _ANSWER.size


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """All that a client needs to connect. It pickles."""

    host: str
    port: int
    secret: bytes = dataclasses.field(repr=False)
    tls: TlsFactory | None = None
    """``None`` for a connection without TLS."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def new_secret() -> bytes:
    """A secret that nobody else has."""
    return secrets.token_bytes(SECRET_NBYTES)


class ClientHandshake:
    """The client's side: send :attr:`opening`, then what :meth:`answer` returns."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._ours = secrets.token_bytes(32)
        self.opening = _OPENING.pack(_MAGIC, PROTOCOL, self._ours)

    def answer(self, challenge: bytes, now: float) -> bytes:
        """What proves to the server that we hold the secret, once the server has proved it.

        Args:
            challenge: the server's ``CHALLENGE_NBYTES`` bytes.
            now: what this side's clock reads.

        Raises:
            WireError: who answered does not hold the secret.
        """
        theirs, proof = _CHALLENGE.unpack(challenge)
        both = self._ours + theirs
        if not hmac.compare_digest(proof, _proof(self._secret, b"server", both)):
            raise WireError("who listens there does not hold this server's secret")
        claim = _CLAIM.pack(now, os.getpid())
        return claim + _proof(self._secret, b"client", both + claim)


class ServerHandshake:
    """The server's side: send what :meth:`challenge` returns, then :meth:`check`."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._both = b""

    def challenge(self, opening: bytes) -> bytes:
        """What answers the client's ``OPENING_NBYTES`` bytes.

        Raises:
            WireError: it is not a client of ours.
        """
        magic, protocol, theirs = _OPENING.unpack(opening)
        if magic != _MAGIC:
            raise WireError(f"a connection that opens with {magic!r}")
        if protocol != PROTOCOL:
            raise WireError(f"protocol {protocol}, this server speaks {PROTOCOL}")
        ours = secrets.token_bytes(32)
        self._both = theirs + ours
        return ours + _proof(self._secret, b"server", self._both)

    def check(self, answer: bytes) -> float:
        """What the client's clock read when it sent these ``ANSWER_NBYTES`` bytes.

        Raises:
            WireError: it does not hold the secret.
        """
        now, pid, proof = _ANSWER.unpack(answer)
        claim = _CLAIM.pack(now, pid)
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", self._both + claim)):
            raise WireError("a client without the secret")
        return float(now)


def _proof(secret: bytes, who: bytes, what: bytes) -> bytes:
    return hmac.digest(secret, b"aioinfer " + who + b"\0" + what, "sha256")
