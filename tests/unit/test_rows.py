"""Batches as bytes: what is joined from bodies and cut into replies is what tensors would give."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from aioinfer.collation import Collator
from aioinfer.replies import Columns
from aioinfer.request import Request, Source
from aioinfer.signature import describe
from aioinfer.transports import wire
from aioinfer.transports.wire import Kind, payload
from aioinfer.transports.wire.frames import FrameReader
from aioinfer.transports.wire.rows import Bodies, PackedColumns

DTYPES = [torch.float32, torch.int64, torch.bool, torch.uint8, torch.bfloat16, torch.float16]
SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (2, 5), (0,), (3, 0), (7, 1, 3), (2000,)]


def random_row(chance: random.Random, fields: list[Any], size: list[int]) -> TensorDict:
    leaves = {}
    for name, shape, dtype in fields:
        leaf = torch.tensor([chance.randrange(100) for _ in range(8)]).to(dtype)
        count = torch.Size([*size, *shape]).numel()
        leaves[name] = leaf.repeat(count // 8 + 1)[:count].view((*size, *shape)).contiguous()
    return TensorDict(leaves, size)


def both(td: TensorDict, start: int) -> tuple[Request, Request]:
    """The same request as tensors and as bytes, which lie behind ``start`` other bytes."""
    data, rows, batched, signature = describe(td, None)
    as_tensors = Request(data, rows, batched, signature, None, 0, Source(), None)
    packed = payload.pack_described(data, rows, batched, signature)
    assert packed.layout is not None
    body = bytearray(start) + b"".join(packed.buffers)
    as_bytes = Request(body, rows, batched, signature, None, 0, Source(), None)
    as_bytes.encoding = Bodies.of(packed.layout, start)
    return as_tensors, as_bytes


@pytest.fixture
def collator() -> Collator:
    return Collator(
        collate_fn=None,
        device=None,
        output_device=None,
        out_keys=None,
        version_key=None,
        return_inputs=False,
    )


@pytest.mark.parametrize("seed", range(60))
def test_joining(seed: int, collator: Collator):
    """A batch of bodies, bare rows or not, padded or not, is the batch of the same tensors."""
    chance = random.Random(seed)
    fields = [
        (f"leaf {i}", chance.choice(SHAPES), chance.choice(DTYPES))
        for i in range(chance.randrange(1, 5))
    ]
    start = chance.choice([0, wire.REQUEST_NBYTES])
    sizes = chance.choice([[[]], [[3]], [[], [1], [4]]])
    tds = [random_row(chance, fields, chance.choice(sizes)) for _ in range(chance.randrange(1, 9))]
    pairs = [both(td, start) for td in tds]
    rows = sum(request.rows for request, _ in pairs)
    size = rows + chance.choice([0, 0, 1, 5])
    expected = collator.collate([tensors for tensors, _ in pairs], rows, size)
    kinds = [[found for _, found in pairs], [chance.choice(pair) for pair in pairs]]
    for requests in kinds:  # all of them bytes, and some of them
        batch = collator.collate(requests, rows, size)
        assert batch.batch_size == expected.batch_size == torch.Size([size])
        for name, _, dtype in fields:
            assert batch[name].dtype == dtype
            assert batch[name].is_contiguous()
            assert batch[name].equal(expected[name])


def test_a_batch_is_memory_of_its_own(collator: Collator):
    """What the policy does to its batch does not show in what was sent."""
    _, request = both(TensorDict({"x": torch.ones(3)}), 0)
    before = bytes(request.data)
    collator.collate([request], 1, 1)["x"].zero_()
    assert request.data == before


def replies(columns: Columns, layout_ids: list[int]) -> list[TensorDict]:
    """What callers read in the frames made of columns."""
    packed = PackedColumns.of(columns.by_name)
    assert packed is not None
    frames: list[Any]
    ids = range(100, 100 + len(columns.requests))
    if columns.bare:
        frames = packed.replies(ids, layout_ids)
    else:
        frames = [
            wire.encode_reply(
                request_id,
                layout_id,
                packed.rows(start, request.rows),
                request.rows,
                request.batched,
            )
            for request_id, layout_id, request, start in zip(
                ids, layout_ids, columns.requests, columns.starts, strict=True
            )
        ]
    found = []
    for frame, request_id, layout_id in zip(frames, ids, layout_ids, strict=True):
        reader = FrameReader()
        reader.space()[: len(frame)] = frame
        [(kind, body)] = reader.received(len(frame))
        assert kind is Kind.REPLY
        head = wire.decode_reply(body)
        assert (head.request_id, head.layout_id) == (request_id, layout_id)
        leaves = packed.layout.read(body, head.rows, head.batched, wire.REPLY_NBYTES)
        found.append(packed.layout.tensordict(leaves, head.rows, head.batched))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_cutting(seed: int):
    """What a caller reads in its reply is the result that it would get in this process."""
    chance = random.Random(seed)
    fields = [
        (f"leaf {i}", chance.choice(SHAPES), chance.choice(DTYPES))
        for i in range(chance.randrange(1, 5))
    ]
    sizes = chance.choice([[[]], [[3]], [[], [1], [4]]])
    requests = [
        both(random_row(chance, fields, chance.choice(sizes)), 0)[0]
        for _ in range(chance.randrange(1, 9))
    ]
    rows = sum(request.rows for request in requests)
    answer = random_row(chance, fields, [rows])
    columns = Columns.of({name: answer[name] for name, _, _ in fields}, requests, rows)
    layout_ids = [chance.choice([0, 0, 7]) for _ in requests]
    for read, expected in zip(replies(columns, layout_ids), columns.results(), strict=True):
        assert read.batch_size == expected.batch_size
        for name, _, dtype in fields:
            assert read[name].dtype == dtype
            assert read[name].equal(expected[name])


def test_what_has_no_columns():
    """Columns that must travel as objects are left to who packs the results one by one."""
    assert PackedColumns.of({"x": torch.ones(2, 3, device="meta")}) is None
    assert PackedColumns.of({"x": torch.ones(2, 3).to_sparse()}) is None
