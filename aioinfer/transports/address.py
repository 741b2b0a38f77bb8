"""Where a server listens for the processes of its host, and who may speak to it."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import tempfile
from typing import NamedTuple


class Connection(socket.socket):
    """A socket that closes itself, without complaint, when nothing refers to it any more."""

    def __del__(self) -> None:
        self.close()


class Address(NamedTuple):
    """A Unix socket and the secret that opens it. It pickles; it is all that a client needs."""

    path: str
    token: bytes

    @classmethod
    def new(cls) -> Address:
        """An address that nobody else has."""
        name = f"aioinfer-{secrets.token_hex(16)}"
        # An abstract name leaves nothing behind in any folder, whoever is killed.
        path = f"\0{name}" if sys.platform == "linux" else os.path.join(tempfile.gettempdir(), name)
        return cls(path, secrets.token_bytes(32))

    def listen(self) -> socket.socket:
        """A non-blocking socket that listens here.

        Raises:
            OSError: somebody else does.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self.path)
            if not self.path.startswith("\0"):
                os.chmod(self.path, 0o600)
            listener.listen(4096)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        return listener

    def unlink(self) -> None:
        """Remove what :meth:`listen` left in the file system, if anything."""
        if not self.path.startswith("\0"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def connect(self) -> socket.socket:
        """A connection to who listens here.

        Raises:
            OSError: nobody does.
        """
        connection = Connection(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                connection.setblocking(False)
                connection.connect(self.path)
            except BlockingIOError:  # thousands come at once
                connection.settimeout(5.0)
                connection.connect(self.path)
        except BaseException:
            connection.close()
            raise
        return connection
