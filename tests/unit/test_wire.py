"""Frames, messages and tensors as bytes, and what happens to bytes that are none of these."""

from __future__ import annotations

import gc
import io
import itertools
import pickle
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import encode_request
from hypothesis import given, settings
from tensordict import NonTensorData, TensorDict, lazy_stack, tensorclass
from tensordict.nn import InteractionType

from aioinfer import errors
from aioinfer.errors import InferenceError, InvalidRequestError, ModelError
from aioinfer.request import GivenUp
from aioinfer.signature import describe
from aioinfer.transports import wire
from aioinfer.transports.wire import Kind, WireError, dtypes, payload
from aioinfer.transports.wire.frames import FrameReader
from aioinfer.transports.wire.layouts import (
    LAYOUT_IDS,
    OBJECT,
    Layout,
    LayoutReceiver,
    LayoutSender,
    decode_layout,
    encode_layout,
)

# The same examples in every run: what a run finds, the next one finds too.
settings.register_profile("wire", derandomize=True, database=None, deadline=None, max_examples=60)
REPEATABLE = settings.get_profile("wire")

DTYPES = [known.torch for known in dtypes.BY_NUMBER.values()]

# torch says so of every complex32 tensor, however it was made.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@tensorclass
class Camera:
    """A tensorclass."""

    image: torch.Tensor
    name: str = "front"


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor with bytes that differ, of any dtype."""
    generator = torch.Generator().manual_seed(1)
    high = 2 if dtype is torch.bool else 64
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, high, (nbytes,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are alike to the last bit, in dtype and shape too."""
    a, b = a.detach().resolve_conj(), b.detach().resolve_conj()
    return (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape) and a.contiguous().view(
        -1
    ).view(torch.uint8).tolist() == b.contiguous().view(-1).view(torch.uint8).tolist()


def read_all(stream: bytes, cuts: list[int] | None = None, **options: Any) -> list[Any]:
    """What a reader makes of a stream that comes in pieces."""
    reader = FrameReader(**options)
    frames: list[Any] = []
    bounds = [0, *sorted(cuts or []), len(stream)]
    for start, stop in itertools.pairwise(bounds):
        at = start
        while at < stop:
            space = reader.space()
            count = min(len(space), stop - at)
            space[:count] = stream[at : at + count]
            frames += reader.received(count)
            at += count
    reader.space()  # whoever reads on learns of a fault
    return frames


def body_of(frame: bytes, kind: Kind) -> bytearray:
    """The body of the one frame there is."""
    [(found, body)] = read_all(frame)
    assert found is kind
    return body


class Side:
    """The layout ids of one direction, both ends of it."""

    def __init__(self) -> None:
        self.sender = LayoutSender()
        self.receiver = LayoutReceiver()

    def id_of(self, layout: Layout | None) -> int:
        layout_id, definition = self.sender.id_of(layout)
        if definition is not None:
            self.receiver.define(*decode_layout(body_of(definition, Kind.LAYOUT)))
        return layout_id


def request_through(td: Any, side: Side | None = None) -> Any:
    """A request, sent and received: its data as the server sees it."""
    side = side or Side()
    data, rows, batched, signature = describe(td, None)
    packed = payload.pack_described(data, rows, batched, signature)
    frame = encode_request(1, 2, side.id_of(packed.layout), packed, rows, batched, submitted_at=0.0)
    body = body_of(frame, Kind.REQUEST)
    head = wire.decode_request(body)
    assert (head.rows, head.batched) == (rows, batched)
    layout = side.receiver.get(head.layout_id)
    if layout is None:
        return payload.unpack_object(body, wire.REQUEST_NBYTES)
    assert layout is packed.layout
    leaves = layout.read(body, head.rows, head.batched, wire.REQUEST_NBYTES)
    return layout.tensordict(leaves, head.rows, head.batched)


def reply_through(td: Any) -> Any:
    """A reply, sent and received, as its caller sees it."""
    side = Side()
    packed = payload.pack(td)
    batched = len(td.batch_size) > 0
    rows = td.batch_size.numel()
    frame = wire.encode_reply(1, side.id_of(packed.layout), packed, rows, batched)
    body = body_of(frame, Kind.REPLY)
    head = wire.decode_reply(body)
    layout = side.receiver.get(head.layout_id)
    if layout is None:
        return payload.unpack_object(body, wire.REPLY_NBYTES)
    leaves = layout.read(body, head.rows, head.batched, wire.REPLY_NBYTES)
    return layout.tensordict(leaves, head.rows, head.batched)


def assert_alike(found: Any, sent: Any) -> None:
    """Two TensorDicts hold the same, in the same shape."""
    assert found.batch_size == sent.batch_size
    keys = set(sent.keys(True, True))
    assert set(found.keys(True, True)) == keys
    for key in keys:
        assert same(found[key], sent[key]), key


class TestTensors:
    """Dense tensors arrive as they were, by layout."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_and_shape(self, dtype: torch.dtype) -> None:
        """A leaf of any dtype, also without elements, arrives to the last bit."""
        for shape in ((), (3,), (2, 5), (0,), (3, 0, 2)):
            td = TensorDict({"x": some(dtype, *shape), "y": some(torch.uint8, 3)})
            assert payload.pack(td).layout is not None
            assert_alike(request_through(td), td)
            assert_alike(reply_through(td), td)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_k_rows(self, dtype: torch.dtype) -> None:
        """K rows arrive as K rows, also where a row is a scalar or empty."""
        for rows in (1, 2, 7):
            td = TensorDict(
                {"x": some(dtype, rows, 3), "s": some(dtype, rows), "none": some(dtype, rows, 0)},
                batch_size=[rows],
            )
            assert_alike(request_through(td), td)
            assert_alike(reply_through(td), td)

    def test_any_number_of_rows_has_one_layout(self) -> None:
        """``[]``, ``[1]`` and ``[5]`` of the same row use one layout id."""
        side = Side()
        bare = TensorDict({"x": torch.arange(3.0), "flag": torch.tensor(True)})
        for td in (bare, bare.expand(1), bare.expand(5)):
            assert_alike(request_through(td, side), td)
        assert side.sender._next == 1

    def test_nested(self) -> None:
        """Nested TensorDicts arrive nested, as one row and as rows, without a pickle."""
        td = TensorDict(
            {"a": {"b": {"c": torch.ones(2)}, "d": torch.tensor(1)}, "e": torch.ones(0)}
        )
        for each in (td, td.expand(3)):
            assert payload.pack(each).layout is not None
            assert_alike(request_through(each), each)
            found = reply_through(each)
            assert_alike(found, each)
            assert found["a"].batch_size == each.batch_size

    @pytest.mark.parametrize("batch_size", [[], [2]], ids=str)
    def test_no_entries(self, batch_size: list[int]) -> None:
        """An empty TensorDict arrives empty."""
        td = TensorDict({}, batch_size=batch_size)
        assert_alike(request_through(td), td)
        assert_alike(reply_through(td), td)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.arange(12.0).view(3, 4).t(),
            torch.arange(12.0)[::3],
            torch.arange(3.0).expand(4, 3),
            torch.arange(12).view(3, 4).bfloat16().t(),
            torch.ones(3, requires_grad=True),
            torch.ones(3, dtype=torch.bfloat16, requires_grad=True),
            torch.nn.Parameter(torch.ones(3)),
            torch.randn(3, dtype=torch.complex64).conj(),
            torch.randn(3, dtype=torch.complex128).conj().imag,
            torch.randn(5)[2:],
        ],
        ids=[
            *("transposed", "strided", "expanded", "transposed bfloat16", "grad", "bfloat16 grad"),
            *("parameter", "conj", "neg", "offset"),
        ],
    )
    @pytest.mark.parametrize("through", [request_through, reply_through])
    def test_however_it_lies_in_memory(
        self, tensor: torch.Tensor, through: Callable[[Any], Any]
    ) -> None:
        """What arrives are the values, detached, whatever the strides and flags were."""
        found = through(TensorDict({"x": tensor}))["x"]
        assert same(found, torch.Tensor(tensor) if type(tensor) is torch.nn.Parameter else tensor)
        assert not found.requires_grad
        assert found.is_contiguous()

    def test_conjugate_of_a_type_that_numpy_lacks(self) -> None:
        """The conjugate arrives, not the numbers that lie in memory."""
        tensor = torch.tensor([1 + 2j]).to(torch.complex32).conj()
        found = reply_through(TensorDict({"x": tensor}))["x"]
        assert found.to(torch.complex64).tolist() == [1 - 2j]

    def test_memory_mapped(self) -> None:
        """A memory-mapped TensorDict arrives as a plain one."""
        td = TensorDict({"x": torch.arange(3.0)})
        found = reply_through(td.memmap_like().copy_(td))
        assert_alike(found, TensorDict({"x": torch.arange(3.0)}))

    def test_what_arrives_can_be_written(self) -> None:
        """Tensors lie in a body of their own: writing to one changes no other."""
        td = TensorDict({"x": torch.zeros(3)})
        packed = payload.pack(td)
        stream = b"".join([wire.encode_reply(i, 0, packed) for i in range(2)])
        first, second = [
            packed.layout.read(body, start=wire.REPLY_NBYTES)[0] for _, body in read_all(stream)
        ]
        first += 1
        assert second.tolist() == [0, 0, 0]

    @pytest.mark.parametrize("other", [{}, {"name": "a"}], ids=["layout", "object"])
    def test_tensors_without_values(self, other: dict[str, Any]) -> None:
        """A tensor on ``meta`` is refused where it was made."""
        with pytest.raises(InvalidRequestError, match="holds no values"):
            payload.pack(TensorDict({"x": torch.ones(3, device="meta"), **other}))

    def test_keys_may_hold_any_text(self) -> None:
        """A key is any str, also one that is no valid Unicode."""
        td = TensorDict({"å/ .": torch.ones(1), "\ud800": torch.ones(2), "": torch.ones(3)})
        assert_alike(request_through(td), td)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_in_a_slot(self, rows: int) -> None:
        """A payload written to a slot is read there, and the slot may be larger."""
        td = TensorDict({"x": some(torch.complex64, 3), "b": some(torch.bool, 3)}).expand(rows)
        packed = payload.pack(td)
        arena = bytearray(packed.nbytes + 32)
        view = memoryview(arena)[16:]
        packed.write(view)
        leaves = packed.layout.read(view, rows, True, exact=False)
        assert_alike(packed.layout.tensordict(leaves, rows, True), td)
        assert arena[-16:] == bytes(16)
        leaves[0].zero_()
        assert bytes(view[: 24 * rows]) == bytes(24 * rows)

    def test_a_slot_that_is_too_small(self) -> None:
        """A payload is never read past the end of its memory."""
        layout = payload.pack(TensorDict({"x": torch.ones(3)})).layout
        with pytest.raises(WireError, match="must have 16"):
            layout.read(bytearray(15), exact=False)
        with pytest.raises(WireError, match="must have 16"):
            layout.read(bytearray(24))

    def test_too_many_rows_of_nothing(self) -> None:
        """A row count that no tensor can have is an error of the peer, even without bytes."""
        layout = Layout.of_fields((("x", torch.Size([0, 1 << 40]), torch.float64),))
        with pytest.raises(WireError, match="cannot be read"):
            layout.read(bytearray(), 1 << 31, True)


class TestObjects:
    """Everything else arrives too."""

    @pytest.mark.parametrize("through", [request_through, reply_through])
    def test_tensorclass(self, through: Callable[[Any], Any]) -> None:
        """A tensorclass arrives as one, with its non-tensor field."""
        found = through(Camera(torch.arange(6.0).view(2, 3), name="rear", batch_size=[2]))
        assert type(found) is Camera
        assert found.name == "rear"
        assert found.batch_size == torch.Size([2])
        assert same(found.image, torch.arange(6.0).view(2, 3))

    @pytest.mark.parametrize("through", [request_through, reply_through])
    def test_non_tensor_data(self, through: Callable[[Any], Any]) -> None:
        """Non-tensor data arrives, also where it differs from row to row."""
        one = TensorDict({"x": torch.ones(2), "name": NonTensorData({"a": [1]})})
        found = through(one)
        assert found["name"] == {"a": [1]}
        assert same(found["x"], torch.ones(2))
        two = torch.stack([one, TensorDict({"x": torch.ones(2), "name": NonTensorData("b")})])
        assert through(two)["name"] == [{"a": [1]}, "b"]

    def test_lazy_stacks(self) -> None:
        """A lazy stack arrives as one; in a reply its rows may differ in shape."""
        stack = lazy_stack([TensorDict({"x": torch.full((2,), float(i))}) for i in range(3)])
        found = request_through(stack)
        assert type(found) is type(stack)
        assert same(found["x"], stack["x"])
        ragged = lazy_stack([TensorDict({"x": torch.ones(i)}) for i in range(3)])
        rows = reply_through(ragged).unbind(0)
        assert [row["x"].shape[0] for row in rows] == [0, 1, 2]

    @pytest.mark.parametrize(
        "td",
        [
            TensorDict({"x": torch.ones(3, 2)}, [3], names=["time"]),
            TensorDict({"a": TensorDict({"x": torch.ones(3, 2)}, [3])}),
            TensorDict({"a": TensorDict({})}),
            TensorDict({"x": torch.ones([1] * 40)}),
            TensorDict({"x": torch.ones(2), "y" * 70_000: torch.ones(1)}),
        ],
        ids=["names", "inner batch size", "empty inner", "many dimensions", "long key"],
    )
    def test_what_a_layout_cannot_say(self, td: TensorDict) -> None:
        """Structure that a layout has no words for is kept by sending the object."""
        assert payload.pack(td).layout is None
        found = reply_through(td)
        assert_alike(found, td)
        assert found.batch_size == td.batch_size
        assert found.names == td.names
        if "a" in td:
            assert found["a"].batch_size == td["a"].batch_size

    def test_sparse_tensors(self) -> None:
        """A tensor without plain bytes arrives as what it is."""
        for through in (request_through, reply_through):
            found = through(TensorDict({"x": torch.eye(3).to_sparse()}))
            assert found["x"].is_sparse
            assert same(found["x"].to_dense(), torch.eye(3))

    def test_tensors_travel_as_bytes(self) -> None:
        """A tensor is not in the pickle, and one that is there twice is sent once."""
        image = torch.arange(1000.0, requires_grad=True)
        packed = payload.pack(TensorDict({"x": image, "y": image, "name": "a"}))
        assert packed.layout is None
        assert 4000 < packed.nbytes < 6000
        found = payload.unpack_object(bytearray(b"".join(packed.buffers)))
        assert found["x"].data_ptr() == found["y"].data_ptr()
        assert same(found["x"], image)
        assert not found["x"].requires_grad

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype(self, dtype: torch.dtype) -> None:
        """Tensors beside non-tensor data arrive to the last bit, also without elements."""
        td = TensorDict({"x": some(dtype, 2, 3), "y": some(dtype, 0), "name": "a"})
        found = reply_through(td)
        assert same(found["x"], td["x"])
        assert same(found["y"], td["y"])

    def test_in_a_slot(self) -> None:
        """An object in a slot knows its own size."""
        packed = payload.pack(Camera(torch.ones(3), batch_size=[]))
        slot = bytearray(packed.nbytes + 8)
        packed.write(memoryview(slot))
        assert same(payload.unpack_object(slot, exact=False).image, torch.ones(3))
        with pytest.raises(WireError, match="has"):
            payload.unpack_object(slot)

    @pytest.mark.parametrize("through", [request_through, reply_through])
    def test_what_cannot_be_pickled(self, through: Callable[[Any], Any]) -> None:
        """It is refused where it was made, and the reason is named."""
        td = TensorDict({"x": torch.ones(1), "f": NonTensorData(lambda: None)})
        with pytest.raises(InvalidRequestError, match="cannot be pickled.*lambda"):
            through(td)

    def test_what_cannot_be_rebuilt(self) -> None:
        """A class unknown here is the fault of this object, not of the connection."""
        pickled = pickle.dumps(Camera).replace(b"Camera", b"Lidar_")
        padded = pickled + bytes(-len(pickled) % 8)
        body = payload._OBJECT.pack(16 + len(padded), len(pickled)) + padded
        with pytest.raises(InvalidRequestError, match="Lidar_"):
            payload.unpack_object(bytearray(body))

    @pytest.mark.parametrize("keep", [0, 15, 16, 40, -8, -1])
    def test_truncated(self, keep: int) -> None:
        """An object that is not all there is an error of the peer."""
        packed = payload.pack(Camera(torch.ones(3), batch_size=[]))
        body = bytearray(b"".join(packed.buffers))
        with pytest.raises(WireError):
            payload.unpack_object(body[:keep])

    @pytest.mark.parametrize(
        "place",
        [(0, 10, (4,), 0), (0, 10, (2,), 4), (0, 10, (1,), -8), (0, 99, (1,), 0), (0, 10, "x", 0)],
        ids=["large", "crooked", "before", "dtype", "shape"],
    )
    def test_a_tensor_outside_of_the_payload(self, place: Any) -> None:
        """A tensor can lie nowhere but in the payload."""

        class Placed(pickle.Pickler):
            def persistent_id(self, obj: Any) -> Any:
                return place if obj is place else None

        file = io.BytesIO()
        Placed(file, protocol=5).dump(place)
        pickled = file.getvalue()
        padded = pickled + bytes(-len(pickled) % 8)
        head = payload._OBJECT.pack(16 + len(padded) + 8, len(pickled))
        with pytest.raises((WireError, InvalidRequestError)):
            payload.unpack_object(bytearray(head + padded + bytes(8)))


class TestMessages:
    """Every message arrives as it was sent."""

    @pytest.mark.parametrize(
        ("message", "kind"),
        [
            (wire.Hello(wire.PROTOCOL, 77, bytes(range(32))), Kind.HELLO),
            (wire.Welcome(wire.PROTOCOL, 78, -1), Kind.WELCOME),
            (wire.Join(5), Kind.JOIN),
            (wire.Leave(5), Kind.LEAVE),
            (wire.Arena(3, 1 << 40), Kind.ARENA),
            (wire.GiveUp(1 << 63, GivenUp.CANCELLED), Kind.GIVE_UP),
            (wire.GiveUp(2, GivenUp.TIMED_OUT), Kind.GIVE_UP),
            (wire.Dropped(9), Kind.DROPPED),
        ],
        ids=lambda value: value.name if isinstance(value, Kind) else None,
    )
    def test_fixed_size(self, message: Any, kind: Kind) -> None:
        """What is decoded equals what was encoded, and another size is refused."""
        body = body_of(wire.encode(message), kind)
        found = wire.decode(kind, body)
        assert found == message
        assert type(found) is type(message)
        for wrong in (body[:-1], body + b"\0", b""):
            with pytest.raises(WireError, match=f"{kind.name} has {len(wrong)} bytes"):
                wire.decode(kind, wrong)

    def test_a_token_has_32_bytes(self) -> None:
        """Another length is the caller's mistake."""
        with pytest.raises(ValueError, match="32 bytes, got 3"):
            wire.encode(wire.Hello(1, 1, b"abc"))

    def test_an_unknown_reason(self) -> None:
        """A number that means nothing is an error of the peer."""
        with pytest.raises(WireError, match="reason 2"):
            wire.decode(Kind.GIVE_UP, b"\0" * 8 + b"\2")

    @pytest.mark.parametrize("mode", [None, *InteractionType])
    def test_requests(self, mode: InteractionType | None) -> None:
        """Every field of a request arrives, whatever the sampling mode."""
        packed = payload.pack(TensorDict({"x": torch.ones(4, 3)}, [4]))
        slot = wire.Slot(3, 4096, 1 << 33)
        frame = encode_request(
            1 << 60, 7, 11, packed, 4, True, submitted_at=12.5, timeout=0.25, priority=-3,
            mode=mode, block=False, slot=slot, in_slot=True, reply_in_slot=True,
        )  # fmt: skip
        assert wire.decode_request(body_of(frame, Kind.REQUEST)) == wire.RequestHead(
            1 << 60, 7, 11, 4, True, -3, 0.25, 12.5, mode, False, slot, True, True
        )

    def test_a_plain_request(self) -> None:
        """One bare row without anything special arrives as that."""
        packed = payload.pack(TensorDict({"x": torch.ones(3)}))
        body = body_of(encode_request(1, 2, 3, packed, submitted_at=0.0), Kind.REQUEST)
        assert wire.decode_request(body) == wire.RequestHead(
            1, 2, 3, 1, False, 0, None, 0.0, None, True, None, False, False
        )
        assert len(body) == wire.REQUEST_NBYTES + 16

    def test_a_slot_for_the_reply_alone(self) -> None:
        """A slot may be offered for the reply while the request is inline."""
        packed = payload.pack(TensorDict({"x": torch.ones(3)}))
        frame = encode_request(
            1, 2, 3, packed, submitted_at=0.0, slot=wire.Slot(1, 8, 64), reply_in_slot=True
        )
        head = wire.decode_request(body_of(frame, Kind.REQUEST))
        assert (head.slot, head.in_slot, head.reply_in_slot) == (wire.Slot(1, 8, 64), False, True)

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            (24, b"\x06"),
            (25, b"\x08"),
            (16, np.float64(-1).tobytes()),
            (16, np.float64("inf").tobytes()),
            (56, np.float64("nan").tobytes()),
        ],
        ids=["mode", "flags", "negative timeout", "endless timeout", "no time"],
    )
    def test_fields_out_of_range(self, at: int, value: bytes) -> None:
        """A field that means nothing is an error of the peer."""
        packed = payload.pack(TensorDict({}))
        body = body_of(encode_request(1, 2, 3, packed, submitted_at=0.0), Kind.REQUEST)
        body[at : at + len(value)] = value
        with pytest.raises(WireError, match="REQUEST"):
            wire.decode_request(body)

    def test_slots_that_cannot_be(self) -> None:
        """A slot starts at a multiple of 8, and leaves nothing to send inline."""
        packed = payload.pack(TensorDict({"x": torch.ones(3)}))
        frame = encode_request(
            1, 2, 3, packed, submitted_at=0.0, slot=wire.Slot(0, 4, 64), reply_in_slot=True
        )
        with pytest.raises(WireError, match="multiple of 8"):
            wire.decode_request(frame[8:])
        frame = encode_request(
            1, 2, 3, packed, submitted_at=0.0, slot=wire.Slot(0, 8, 64), in_slot=True
        )
        with pytest.raises(WireError, match="in a slot"):
            wire.decode_request(frame[8:] + bytes(8))

    @pytest.mark.parametrize("in_slot", [False, True])
    def test_replies(self, in_slot: bool) -> None:
        """Every field of a reply arrives; a payload in a slot is not sent twice."""
        packed = payload.pack(TensorDict({"x": torch.ones(4, 3)}, [4]))
        body = body_of(
            wire.encode_reply(9, 8, packed, 4, True, in_slot=in_slot, room=3, load=2), Kind.REPLY
        )
        assert wire.decode_reply(body) == wire.ReplyHead(9, 8, 4, True, in_slot, 3, 2)
        assert len(body) == wire.REPLY_NBYTES + (0 if in_slot else 48)
        body[16] = 2
        with pytest.raises(WireError, match="flags"):
            wire.decode_reply(body)

    def test_payloads_are_aligned(self) -> None:
        """What stands before a payload is a multiple of 8 bytes."""
        assert wire.REQUEST_NBYTES % 8 == wire.REPLY_NBYTES % 8 == 0
        assert (wire.REQUEST_NBYTES, wire.REPLY_NBYTES) == (64, 24)


class Odd(Exception):
    """An exception that nobody can read."""

    def __str__(self) -> str:
        raise RuntimeError("no")


class TestErrors:
    """Exceptions travel as text."""

    def through(self, error: BaseException, kind: Kind = Kind.ERROR) -> Exception:
        request_id, found = wire.decode_error(body_of(wire.encode_error(5, error, kind), kind))
        assert request_id == 5
        return found

    @pytest.mark.parametrize(
        "kind", [*errors.__all__, "TimeoutError", "ValueError", "TypeError", "RuntimeError"]
    )
    def test_known_classes(self, kind: str) -> None:
        """They arrive as themselves, with their message, as fresh objects."""
        cls = getattr(errors, kind, None) or getattr(__import__("builtins"), kind)
        sent = cls("what ö \ud800 went wrong")
        for frame_kind in (Kind.ERROR, Kind.CLOSING):
            found = self.through(sent, frame_kind)
            assert type(found) is cls
            assert found is not sent
            assert str(found) == "what ö \\ud800 went wrong"
            assert found.__cause__ is None

    def test_other_classes(self) -> None:
        """They arrive as InferenceError, and the message names the class."""
        assert type(self.through(KeyError("x"))) is InferenceError
        assert str(self.through(KeyError("x"))) == "builtins.KeyError: 'x'"
        mine = type("ValueError", (ValueError,), {"__module__": "mine"})("x")
        assert str(self.through(mine)) == "mine.ValueError: x"

    def test_the_cause_is_text(self) -> None:
        """The traceback of the cause arrives as what the cause's str is."""
        try:
            try:
                raise KeyError("deep inside")
            except KeyError as cause:
                raise ModelError("the policy raised") from cause
        except ModelError as error:
            found = self.through(error)
        assert type(found) is ModelError
        assert type(found.__cause__) is wire.RemoteTraceback
        assert "test_the_cause_is_text" in str(found.__cause__)
        assert "KeyError: 'deep inside'" in str(found.__cause__)

    def test_an_exception_that_cannot_be_read(self) -> None:
        """Even then something arrives, whether it is the error or its cause."""
        found = self.through(Odd())
        assert "Odd failed to say: RuntimeError" in str(found)
        error = ModelError("x")
        error.__cause__ = Odd()
        assert isinstance(self.through(error).__cause__, wire.RemoteTraceback)

    def test_long_texts_are_cut_in_the_middle(self) -> None:
        """Beginning and end arrive, and the text says that something is missing."""
        found = str(self.through(ValueError("a" * 500_000 + "b" * 500_000)))
        assert len(found) <= wire.MAX_TEXT
        assert found.startswith("aaa")
        assert found.endswith("bbb")
        assert "characters left out" in found

    def test_damaged(self) -> None:
        """Lengths that do not match and text that is none are errors of the peer."""
        body = body_of(wire.encode_error(1, ValueError("a message")), Kind.ERROR)
        for wrong in (body[:10], body[:-1], body + b"x", body[:-1] + b"\xff"):
            with pytest.raises(WireError):
                wire.decode_error(wrong)


def leaf(key: tuple[bytes, ...], dtype: int, *sizes: int) -> bytes:
    """A leaf in a LAYOUT, as the format says."""
    parts = [bytes([dtype, len(key), len(sizes), 0])]
    parts += [len(name).to_bytes(2, "little") + name for name in key]
    parts += [size.to_bytes(8, "little") for size in sizes]
    return b"".join(parts)


def layout_body(*leaves: bytes, layout_id: int = 0, count: int | None = None) -> bytes:
    """The body of a LAYOUT."""
    count = len(leaves) if count is None else count
    return b"".join([layout_id.to_bytes(4, "little"), count.to_bytes(4, "little"), *leaves])


class TestLayouts:
    """Layouts and their ids."""

    def test_alike_is_identical(self) -> None:
        """Requests, replies, batches and descriptions that look alike have one layout object."""
        td = TensorDict({"a": torch.ones(2), "b": torch.tensor(1)})
        layout = payload.pack(td).layout
        assert layout is Layout.of_signature(describe(td, InteractionType.MODE)[3])
        assert layout is payload.pack(td.expand(3)).layout
        assert layout is decode_layout(encode_layout(7, layout)[8:])[1]

    def test_what_has_no_layout(self) -> None:
        """Looks that are not plain have none."""
        assert Layout.of_signature(describe(TensorDict({"name": "a"}), None)[3]) is None

    def test_a_valid_description(self) -> None:
        """The format is what the next tests take it to be."""
        body = layout_body(leaf((b"a",), 10, 2, 3), leaf((b"b", b"c"), 0), layout_id=3)
        layout_id, layout = decode_layout(body)
        assert layout_id == 3
        assert layout.fields == (
            ("a", torch.Size([2, 3]), torch.float32),
            (("b", "c"), torch.Size([]), torch.bool),
        )

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            layout_body(leaf((b"a",), 10), layout_id=LAYOUT_IDS),
            layout_body(leaf((b"a",), 10), count=2),
            layout_body(leaf((b"a",), 10), count=0),
            layout_body(count=0xFFFF_FFFF),
            layout_body(leaf((b"a",), 99)),
            layout_body(leaf((), 10)),
            layout_body(leaf((b"\xff",), 10)),
            layout_body(leaf((b"a",), 10), leaf((b"a",), 11)),
            layout_body(leaf((b"a",), 10), leaf((b"a", b"b"), 11)),
            layout_body(leaf((b"a", b"b", b"c"), 10), leaf((b"a",), 11)),
            layout_body(leaf((b"a",), 10, *[1] * (dtypes.MAX_DIMS + 1))),
            layout_body(leaf((b"a",), 10, (1 << 64) - 1)),
            layout_body(leaf((b"a",), 10, 1 << 63, 2)),
            layout_body(leaf((b"a",), 10, 1 << 32, 1 << 32)),
            layout_body(leaf((b"a",), 10, 0, 1 << 40, 1 << 40)),
            layout_body(*[leaf((b"%d" % i,), 10, 1 << 38) for i in range(4)]),
        ],
        ids=[
            *("empty", "id", "too few", "too many", "giant count", "dtype", "no key", "not UTF-8"),
            *("twice", "leaf and parent", "parent and leaf", "dimensions", "minus one"),
            *("overflow", "product", "hidden by zero", "sum"),
        ],
    )
    def test_descriptions_that_cannot_be(self, body: bytes) -> None:
        """A description that no sender makes is an error of the peer."""
        with pytest.raises(WireError):
            decode_layout(body)

    def test_an_id_is_defined_once(self) -> None:
        """The first use says what the id means; objects need no definition."""
        sender = LayoutSender()
        layout = payload.pack(TensorDict({"x": torch.ones(3)})).layout
        layout_id, definition = sender.id_of(layout)
        assert decode_layout(body_of(definition, Kind.LAYOUT)) == (layout_id, layout)
        assert sender.id_of(layout) == (layout_id, None)
        assert sender.id_of(None) == (OBJECT, None)

    def test_ids_are_a_ring(self) -> None:
        """More layouts than ids: every request still arrives, and memory is bounded."""
        side = Side()
        many = LAYOUT_IDS + 10
        layouts = [Layout.of_fields((("x", torch.Size([i]), torch.uint8),)) for i in range(many)]
        for _ in range(2):
            for layout in layouts:
                layout_id = side.id_of(layout)
                assert layout_id < LAYOUT_IDS
                assert side.receiver.get(layout_id) is layout
        assert len(side.sender._ids) == LAYOUT_IDS
        assert len(side.receiver._layouts) == LAYOUT_IDS + 1

    @pytest.mark.parametrize("layout_id", [0, 5, LAYOUT_IDS])
    def test_an_id_that_was_never_defined(self, layout_id: int) -> None:
        """Using it is an error of the peer."""
        with pytest.raises(WireError, match=f"{layout_id} was never defined"):
            LayoutReceiver().get(layout_id)


FRAMES = [
    wire.encode(wire.Hello(1, 2, bytes(32))),
    wire.encode(wire.Join(1)),
    wire.frame(Kind.LAYOUT),
    wire.frame(Kind.REQUEST, bytes(range(100))),
    wire.encode(wire.Dropped(3)),
]
LARGE = [
    wire.frame(Kind.REPLY, random.Random(1).randbytes(size))
    for size in (16_375, 16_376, 16_377, 65_536, 200_000, 3_000_000, 5)
]


def expected(frames: list[bytes]) -> list[Any]:
    return [(Kind(frame[4]), frame[8:]) for frame in frames]


class TestReader:
    """A stream becomes frames, however it was cut."""

    def test_every_cut(self) -> None:
        """Two pieces, cut anywhere, and one byte at a time: always the same frames."""
        stream = b"".join(FRAMES)
        for cut in range(len(stream) + 1):
            assert read_all(stream, [cut]) == expected(FRAMES)
        assert read_all(stream, list(range(len(stream)))) == expected(FRAMES)

    @REPEATABLE
    @given(
        frames=st.lists(st.sampled_from(FRAMES + LARGE), max_size=12),
        cuts=st.lists(st.integers(0, 1 << 20), max_size=30),
    )
    def test_random_cuts(self, frames: list[bytes], cuts: list[int]) -> None:
        """Small and large frames in any order, cut anywhere, arrive."""
        stream = b"".join(frames)
        cuts = [cut % (len(stream) + 1) for cut in cuts]
        assert read_all(stream, cuts) == expected(frames)

    def test_bodies_are_memory_of_their_own(self) -> None:
        """A body handed out is writable, and not touched by what comes later."""
        reader = FrameReader()
        bodies = []
        for fill in range(1, 4):
            for size in (10, 100_000):
                frame = wire.frame(Kind.REPLY, bytes([fill]) * size)
                at = 0
                while at < len(frame):
                    space = reader.space()
                    count = min(len(space), len(frame) - at)
                    space[:count] = frame[at : at + count]
                    bodies += [(fill, body) for _, body in reader.received(count)]
                    at += count
        assert len(bodies) == 6
        for fill, body in bodies:
            assert set(body) == {fill}
            assert not memoryview(body).readonly
            assert torch.frombuffer(body, dtype=torch.uint8).data_ptr() % 8 == 0

    def test_just_one_request(self) -> None:
        """What is one whole REQUEST and nothing else is handed out at once; nothing else is."""
        whole = wire.frame(Kind.REQUEST, b"abc")
        others = {
            "another kind": wire.frame(Kind.REPLY, b"abc"),
            "a part": whole[:-1],
            "part of a header": whole[:5],
            "two": whole * 2,
            "too large": wire.frame(Kind.REQUEST, b"abcd"),
        }
        for what, stream in others.items():
            reader = FrameReader(max_body=3)
            reader.space()[: len(stream)] = stream
            assert reader.request(len(stream)) is None, what
            if what == "a part":  # it is not lost, and what completes it is no whole request
                assert reader.received(len(stream)) == []
                reader.space()[:1] = whole[-1:]
                assert reader.request(1) is None
                assert reader.received(1) == [(Kind.REQUEST, bytearray(b"abc"))]
        reader = FrameReader(max_body=3)
        for _ in range(2):
            reader.space()[: len(whole)] = whole
            assert reader.request(len(whole)) == bytearray(b"abc")
            assert reader.is_empty

    def test_an_announced_giant_that_never_comes(self) -> None:
        """Memory grows with what came, not with what was announced."""
        header = wire.HEADER.pack(1 << 30, Kind.REPLY)
        gc.collect()
        tracemalloc.start()
        try:
            reader = FrameReader()
            reader.space()[:8] = header
            assert reader.received(8) == []
            reader.space()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 << 20

    @pytest.mark.parametrize("received", [-1, (1 << 16) + 1])
    def test_a_count_that_cannot_be(self, received: int) -> None:
        """More than there was room for is the caller's mistake."""
        with pytest.raises(ValueError, match="between 0 and 65536"):
            FrameReader().received(received)

    @pytest.mark.parametrize(
        ("garbage", "match"),
        [
            (b"GET / HTTP/1.1\r\n", "GET / HT.*kind must be one of"),
            (b"\0\0\0\0\0\0\0\0", "kind must be one of"),
            (wire.HEADER.pack(0, 200), "kind must be one of"),
            (wire.HEADER.pack(0, Kind.HELLO | 1 << 8), "three zero bytes"),
            (wire.HEADER.pack(101, Kind.HELLO), "HELLO frame of 101 bytes.*allowed are 100"),
        ],
        ids=["http", "zeros", "kind", "padding", "oversize"],
    )
    @pytest.mark.parametrize("after", [b"", FRAMES[0] + FRAMES[1]], ids=["first", "later"])
    def test_garbage(self, garbage: bytes, match: str, after: bytes) -> None:
        """The error says what was found and what is allowed, and the reader stays broken."""
        for cuts in ([], list(range(len(after + garbage)))):
            with pytest.raises(WireError, match=match):
                read_all(after + garbage + bytes(8), cuts, max_body=100)
        reader = FrameReader(max_body=100)
        stream = after + garbage
        reader.space()[: len(stream)] = stream
        if after:  # what came before the fault counts
            assert len(reader.received(len(stream))) == 2
        for call in (
            lambda: reader.received(len(stream)),
            reader.space,
            lambda: reader.received(0),
        ):
            with pytest.raises(WireError, match=match):
                call()
        assert reader.broken is not None

    def test_the_largest_body(self) -> None:
        """``max_body`` itself is allowed."""
        frame = wire.frame(Kind.REPLY, bytes(100))
        assert read_all(frame, max_body=100) == expected([frame])


def decode_any(kind: Kind, body: bytearray, layouts: LayoutReceiver) -> None:
    """What a server or client does with a frame, short of unpickling."""
    if kind is Kind.LAYOUT:
        layouts.define(*decode_layout(body))
    elif kind in (Kind.ERROR, Kind.CLOSING):
        wire.decode_error(body)
    elif kind in (Kind.REQUEST, Kind.REPLY):
        head: Any
        if kind is Kind.REQUEST:
            head, start = wire.decode_request(body), wire.REQUEST_NBYTES
        else:
            head, start = wire.decode_reply(body), wire.REPLY_NBYTES
        layout = layouts.get(head.layout_id)
        if layout is not None and not head.in_slot:
            leaves = layout.read(body, head.rows, head.batched, start)
            layout.tensordict(leaves, head.rows, head.batched)
    else:
        wire.decode(kind, body)


def _valid_frames() -> list[bytes]:
    td = TensorDict({"a": {"b": torch.ones(3)}, "c": torch.ones(0), "d": some(torch.bfloat16, 2)})
    packed = payload.pack(td)
    rows = payload.pack(td.expand(3))
    give_up = wire.GiveUp(1, GivenUp.TIMED_OUT)
    return [
        wire.encode(wire.Hello(1, 2, bytes(32))),
        wire.encode(wire.Welcome(1, 2, 3)),
        wire.encode(wire.Arena(1, 2)),
        wire.encode(give_up),
        encode_layout(0, packed.layout),
        encode_request(1, 2, 0, packed, submitted_at=1.0, timeout=1.0),
        encode_request(1, 2, 0, rows, 3, True, submitted_at=1.0),
        wire.encode_reply(1, 0, packed),
        wire.encode_error(1, ModelError("ö" * 20)),
        wire.encode_error(1, errors.ServerClosedError("x"), Kind.CLOSING),
    ]


class TestFuzz:
    """No bytes make a decoder raise anything but WireError."""

    def feed(self, stream: bytes) -> bool:
        layouts = LayoutReceiver()
        layouts.define(0, payload.pack(TensorDict({"x": torch.ones(3)})).layout)
        try:
            for kind, body in read_all(stream, max_body=1 << 20):
                decode_any(kind, body, layouts)
        except WireError:
            return False
        return True

    def test_valid_frames_are_fine(self) -> None:
        """The frames that are damaged below are valid before."""
        assert self.feed(b"".join(_valid_frames()))

    @REPEATABLE
    @given(st.binary(max_size=300))
    def test_random_streams(self, stream: bytes) -> None:
        """Random bytes."""
        self.feed(stream)

    @REPEATABLE
    @given(st.sampled_from(list(Kind)), st.binary(max_size=300))
    def test_random_bodies(self, kind: Kind, body: bytes) -> None:
        """Random bodies in valid frames."""
        self.feed(wire.frame(kind, body))

    def test_mutations(self) -> None:
        """Valid frames with some bytes changed, or with some missing or added."""
        chance = random.Random(4)
        frames = _valid_frames()
        refused = 0
        for _ in range(3000):
            [*kept] = frames
            which = chance.randrange(len(frames))
            damaged = bytearray(frames[which])
            for _ in range(chance.choice([1, 1, 1, 2, 8])):
                at = chance.randrange(4 if chance.random() < 0.1 else 8, len(damaged))
                damaged[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
            kept[which] = bytes(damaged)
            refused += not self.feed(b"".join(kept))
        assert 300 < refused < 2900

    def test_truncated_bodies(self) -> None:
        """Every proper beginning of every body is refused."""
        for frame in _valid_frames():
            kind = Kind(frame[4])
            for length in range(len(frame) - 8):
                layouts = LayoutReceiver()
                td = TensorDict(
                    {"a": {"b": torch.ones(3)}, "c": torch.ones(0), "d": some(torch.bfloat16, 2)}
                )
                layouts.define(0, payload.pack(td).layout)
                with pytest.raises(WireError):
                    decode_any(kind, bytearray(frame[8 : 8 + length]), layouts)
