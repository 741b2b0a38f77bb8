"""What the errors of a device mean: too many rows, or no device any more."""

from __future__ import annotations

import logging
import sys

import torch

from aioinfer.errors import ServerDiedError

_log = logging.getLogger("aioinfer")

_OF_A_DEVICE = (
    "CUDA error: ",  # also of cuBLAS and the like
    "CUDA driver error: ",
    "HIP error: ",
    "Triton Error [",  # compiled policies
    "cuDNN error: ",
)
# Such an error stays with the process: every later call fails with it. These do not.
_PASSING = (
    "out of memory",
    "invalid argument",
    "invalid configuration argument",
    "invalid device function",
    "invalid device ordinal",
    "invalid resource handle",
    "no kernel image",
    "not supported",
    "captur",  # what must not be done while a graph is captured
    "too many resources requested for launch",
    "out of resource",
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    return any([phrase in message for phrase in _OUT_OF_MEMORY])


def device_died(error: BaseException) -> ServerDiedError | None:
    """What to tell everybody, if ``error`` has made the device useless for this process."""
    if not isinstance(error, RuntimeError):  # torch.AcceleratorError is one
        return None
    message = str(error)
    if not message.startswith(_OF_A_DEVICE) or is_out_of_memory(error):
        return None
    if any([passing in message for passing in _PASSING]):
        return None
    if "_STATUS_" in message and _responds():  # a library's code, which says little
        return None
    died = ServerDiedError(
        f"the device failed, and cannot be used by this process any more: {message}"
    )
    died.__cause__ = error
    return died


def _responds() -> bool:
    """Whether the device of the calling thread does what it is asked."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.current_stream().synchronize()
        except RuntimeError:
            return False
    return True


def copy_of(died: ServerDiedError) -> ServerDiedError:
    """Return the same for another waiter."""
    another = ServerDiedError(*died.args)
    another.__cause__ = died.__cause__
    return another


class Room:
    """How many rows a forward may have, as far as its memory is concerned.

    A forward that runs out of memory lowers it. After a while at the limit it is doubled, for
    memory that others held may be free; each time that was in vain, the while is twice as long.
    """

    def __init__(self) -> None:
        self.rows = sys.maxsize
        """Rows that fit, as far as is known."""
        self._succeeded = 0
        self._patience = 256

    def exceeded(self, rows: int, fewer: int) -> None:
        """A forward of ``rows`` rows ran out of memory; the next lower size is ``fewer``."""
        if self.rows == sys.maxsize:
            _log.warning(
                "a forward of %d rows ran out of memory; batches are divided from now on", rows
            )
        elif self._succeeded == 0:
            self._patience *= 2
        self.rows = max(1, min(self.rows, fewer))
        self._succeeded = 0

    def worked(self, rows: int) -> None:
        """A forward of ``rows`` rows succeeded."""
        if 2 * rows <= self.rows:
            return  # that says nothing
        self._succeeded += 1
        if self._succeeded >= self._patience:
            self._succeeded = 0
            self.rows *= 2
