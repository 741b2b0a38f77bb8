"""What two processes say to each other, as bytes.

Nothing in here does I/O: bytes go in and out, and who moves them is not its concern. All numbers
are little endian. A stream is a sequence of :mod:`frames <aioinfer.transports.wire.frames>`, each
of which holds a :mod:`message <aioinfer.transports.wire.messages>`; requests and replies carry a
:mod:`payload <aioinfer.transports.wire.payload>`, which usually lies as a
:mod:`layout <aioinfer.transports.wire.layouts>` says.
"""

from aioinfer.transports.wire.exceptions import (
    MAX_TEXT,
    RemoteTraceback,
    decode_error,
    encode_error,
)
from aioinfer.transports.wire.frames import HEADER, MAX_BODY, Buffer, Kind, WireError, frame
from aioinfer.transports.wire.messages import (
    LOOKS_NBYTES,
    PROTOCOL,
    REPLY_FRAME_NBYTES,
    REPLY_NBYTES,
    REQUEST_NBYTES,
    Arena,
    Dropped,
    GiveUp,
    Hello,
    Join,
    Leave,
    ReplyHead,
    RequestHead,
    Slot,
    Welcome,
    complete_request,
    decode,
    decode_number,
    decode_reply,
    decode_reply_frame,
    decode_request,
    encode,
    encode_looks,
    encode_reply,
)

__all__ = [
    "HEADER",
    "LOOKS_NBYTES",
    "MAX_BODY",
    "MAX_TEXT",
    "PROTOCOL",
    "REPLY_FRAME_NBYTES",
    "REPLY_NBYTES",
    "REQUEST_NBYTES",
    "Arena",
    "Buffer",
    "Dropped",
    "GiveUp",
    "Hello",
    "Join",
    "Kind",
    "Leave",
    "RemoteTraceback",
    "ReplyHead",
    "RequestHead",
    "Slot",
    "Welcome",
    "WireError",
    "complete_request",
    "decode",
    "decode_error",
    "decode_number",
    "decode_reply",
    "decode_reply_frame",
    "decode_request",
    "encode",
    "encode_error",
    "encode_looks",
    "encode_reply",
    "frame",
]
