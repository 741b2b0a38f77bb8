"""The memory of large batches is used again, and never while somebody looks at it."""

from __future__ import annotations

import pytest
import torch

from aioinfer.buffers import MIN_NBYTES, Buffers

SHAPE = (32, MIN_NBYTES // 64)  # of float32: twice the least


def test_memory_that_nobody_looks_at_is_used_again() -> None:
    """When a batch is gone, the next one of its size lies where it lay."""
    buffers = Buffers()
    first = buffers.take(SHAPE, torch.float32)
    assert first is not None
    where = first.data_ptr()
    del first
    second = buffers.take(SHAPE, torch.float32)
    assert second is not None
    assert second.data_ptr() == where


@pytest.mark.parametrize(
    "look", [lambda t: t, lambda t: t[3, 5:], lambda t: t.detach(), lambda t: t.numpy()]
)
def test_memory_that_somebody_looks_at_is_left_alone(look) -> None:
    """Whoever kept a batch, a row of it or a view sees it unchanged."""
    buffers = Buffers()
    first = buffers.take(SHAPE, torch.float32)
    assert first is not None
    kept = look(first.fill_(7))
    del first
    for _ in range(3):
        other = buffers.take(SHAPE, torch.float32)
        if other is not None:
            other.fill_(8)
        del other
    assert (kept == 7).all()


def test_who_keeps_everything_gets_new_memory() -> None:
    """There are two buffers of a size; while both are looked at the allocator is asked."""
    buffers = Buffers()
    kept = [buffers.take(SHAPE, torch.float32) for _ in range(3)]
    assert [one is not None for one in kept] == [True, True, False]


def test_as_many_as_are_in_use() -> None:
    """Without a limit there are as many buffers as were looked at at a time, of any size."""
    allocated: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        allocated.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    buffers = Buffers(allocate, per_size=None)
    for _ in range(3):
        kept = [buffers.take((5,), torch.uint8) for _ in range(4)]
        assert len({one.data_ptr() for one in kept if one is not None}) == 4
        del kept
    assert allocated == [8] * 4


def test_small_batches_are_left_to_the_allocator() -> None:
    """Memory is kept for large batches only."""
    assert Buffers().take((MIN_NBYTES - 1,), torch.uint8) is None
    assert Buffers().take((MIN_NBYTES,), torch.uint8) is not None
    assert Buffers().take((0, 1 << 20), torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.complex128])
def test_every_dtype_has_its_shape(dtype: torch.dtype) -> None:
    """The tensor has the shape and dtype asked for, and is contiguous."""
    tensor = Buffers().take((3, MIN_NBYTES), dtype)
    assert tensor is not None
    assert (tensor.shape, tensor.dtype) == ((3, MIN_NBYTES), dtype)
    assert tensor.is_contiguous()
