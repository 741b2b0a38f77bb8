"""A device that has no memory left, and one that has failed for good."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import InThread, action, outcomes, row, rows, until, within
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, ModelError, ServerClosedError, ServerDiedError
from aioinfer.devices.faults import Room, device_died, is_out_of_memory
from aioinfer.testing import PuppetExecutor, RecordingModel


def room_for(rows: int) -> RecordingModel:
    """A policy whose device has memory for so many rows."""
    model = RecordingModel()
    model.fail_when(
        lambda td: td.batch_size[0] > rows,
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    )
    return model


class TestOutOfMemory:
    """A batch that is too large is divided, and the next one is not tried."""

    async def test_costs_nobody_anything(self) -> None:
        """Everybody is answered, and later batches are divided before they are tried."""
        model = room_for(5)
        puppet = PuppetExecutor()
        async with InferenceServer(model, executor=puppet, max_batch_size=16) as server:
            client = server.async_client()
            with puppet:
                for _ in range(2):
                    answers = [client.submit(row(value)) for value in range(16)]
                    await puppet.submitted()
                    puppet.run_next()
                    replies = await outcomes(*answers)
                    assert [action(reply) for reply in replies] == [2 * v for v in range(16)]
            assert server.stats().failed == 0
        assert model.batch_sizes == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4]

    async def test_a_request_of_many_rows(self) -> None:
        """One request that does not fit is divided too, and its reply is whole."""
        model = room_for(3)
        async with InferenceServer(model, max_batch_size=16) as server:
            values = [float(value) for value in range(11)]
            reply = await within(server.async_client()(rows(values)))
            assert action(reply) == [2 * value for value in values]
            assert reply.batch_size == torch.Size([11])
            assert reply["policy_version"].tolist() == [0] * 11
        assert model.batch_sizes == [11, 3, 3, 5, 2, 1, 2]

    async def test_allowed_sizes(self) -> None:
        """The next lower size is what is tried next, and kept to."""
        model = room_for(4)
        puppet = PuppetExecutor()
        async with InferenceServer(
            model, executor=puppet, max_batch_size=16, batch_sizes=[1, 4, 16]
        ) as server:
            client = server.async_client()
            with puppet:
                for _ in range(2):
                    answers = [client.submit(row(value)) for value in range(7)]
                    await puppet.submitted()
                    puppet.run_next()
                    replies = await outcomes(*answers)
                    assert [action(reply) for reply in replies] == [2 * v for v in range(7)]
        assert model.batch_sizes == [16, 4, 4, 4, 4]

    async def test_one_row_that_does_not_fit(self) -> None:
        """It is an error of its own; the others are served."""
        model = RecordingModel()
        model.fail_when(
            lambda td: bool((td["observation"] < 0).any()),
            lambda: torch.OutOfMemoryError("CUDA out of memory."),
        )
        async with InferenceServer(model, max_batch_size=8) as server:
            client = server.async_client()
            found = await outcomes(*(client(row(value)) for value in (1, -1, 2)))
            assert isinstance(found[1], ModelError)
            assert isinstance(found[1].__cause__, torch.OutOfMemoryError)
            assert [action(found[0]), action(found[2])] == [2, 4]
            again = await outcomes(*(client(row(value)) for value in range(8)))
            assert [action(reply) for reply in again] == [2 * v for v in range(8)]

    async def test_rows_that_cannot_be_joined(self) -> None:
        """Whatever a policy returns for the halves, the caller gets an answer."""
        sizes: list[int] = []

        def odd(td: TensorDictBase) -> Any:
            sizes.append(td.batch_size[0])
            if len(sizes) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return TensorDict({f"action {len(sizes)}": td["observation"]}, td.batch_size)

        async with InferenceServer(odd) as server:
            (error,) = await outcomes(server.async_client()(rows([1, 2])))
        assert isinstance(error, ModelError)
        assert sizes == [2, 1, 1]

    def test_the_limit(self) -> None:
        """It falls at once; it rises after a while of success, and later if that was in vain."""
        room = Room()
        assert room.rows == sys.maxsize
        room.exceeded(100, 50)
        room.exceeded(50, 25)
        assert room.rows == 25
        forwards = []
        for _ in range(2):
            count = 0
            while room.rows == 25:
                room.worked(12)  # too few to say anything
                room.worked(20)
                count += 1
            forwards.append(count)
            assert room.rows == 50
            room.exceeded(50, 25)
        assert forwards[1] == 2 * forwards[0]

    @pytest.mark.parametrize(
        ("error", "is_it"),
        [
            (torch.OutOfMemoryError("CUDA out of memory."), True),
            (RuntimeError("CUDA error: out of memory"), True),
            (
                RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
                True,
            ),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
            (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
            (MemoryError(), True),
            (RuntimeError("shape mismatch"), False),
            (ValueError("out of memory"), False),
        ],
    )
    def test_what_it_looks_like(self, error: BaseException, is_it: bool) -> None:
        """Torch has several ways to say it."""
        assert is_out_of_memory(error) is is_it
        assert device_died(error) is None


ASSERTION = "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"


def assertion() -> BaseException:
    return getattr(torch, "AcceleratorError", RuntimeError)(ASSERTION)


class TestDeviceDied:
    """A sticky error ends the server, and everybody is told why."""

    @pytest.mark.parametrize(
        ("message", "died"),
        [
            ("CUDA error: an illegal memory access was encountered", True),
            ("CUDA error: unspecified launch failure", True),
            ("CUDA error: misaligned address", True),
            ("CUDA driver error: device-side assert triggered", True),
            ("Triton Error [CUDA]: an illegal memory access was encountered", True),
            ("CUDA error: out of memory", False),
            ("CUDA error: operation not permitted when stream is capturing", False),
            ("CUDA error: operation failed due to a previous error during capture", False),
            ("CUDA error: dependency created on uncaptured work in another stream", False),
            ("a policy's own words about an illegal memory access", False),
        ],
    )
    def test_what_it_looks_like(self, message: str, died: bool) -> None:
        """Errors that stay are told from those of one call, and of a policy."""
        assert (device_died(RuntimeError(message)) is not None) is died

    @pytest.mark.parametrize("responds", [True, False])
    def test_a_library_that_fails(self, responds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """What cuBLAS and cuDNN say does not tell, so the device is asked."""

        class Stream:
            def synchronize(self) -> None:
                if not responds:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        for message in (
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle)`",
            "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        ):
            assert (device_died(RuntimeError(message)) is None) is responds

    @pytest.mark.parametrize("make", [assertion, lambda: RuntimeError(ASSERTION)])
    async def test_everybody_is_told(
        self, make: Callable[[], BaseException], logged_errors: list[str]
    ) -> None:
        """Those in the batch, those who wait, coroutines and threads; and nothing hangs."""
        model = RecordingModel()
        model.fail_when(lambda td: True, make)
        server = InferenceServer(model, max_batch_size=2, min_batch_size=2, timeout=100.0)
        async with server:
            client, sync_client = server.async_client(), server.sync_client()
            with model.held():
                waiting = [client.submit(row(value)) for value in (1, 2)]
                await model.entered()
                waiting += [client.submit(row(value)) for value in (3, 4, 5)]
                thread = InThread(sync_client, row(6))
                await thread.blocked()
            found = await outcomes(*waiting, thread)
            assert [type(error) for error in found] == [ServerDiedError] * 6
            assert len({id(error) for error in found}) == 6
            for error in found:
                assert "device-side assert triggered" in str(error)
                assert "the device failed" in str(error)
                assert "device-side" in str(error.__cause__)
            await until(lambda: not server.is_alive)
            (late,) = await outcomes(client(row(7)))
            assert isinstance(late, ServerClosedError)
        assert len(model.batch_sizes) == 1  # nothing was tried again
        assert "device-side assert" in logged_errors.pop()

    async def test_of_one_replica(self, logged_errors: list[str]) -> None:
        """A process has lost all its devices with one: the others do not go on."""
        failing = asyncio.Event()

        class Policy(torch.nn.Module):
            def forward(self, td: TensorDictBase) -> TensorDictBase:
                if failing.is_set():
                    raise RuntimeError(ASSERTION)
                return td

        async with InferenceServer(Policy(), devices=["cpu", "cpu"], max_batch_size=1) as server:
            clients = [server.async_client() for _ in range(8)]
            await outcomes(*(client(row(1)) for client in clients))
            failing.set()
            found = await outcomes(*(client(row(1)) for client in clients))
            assert {type(error) for error in found} == {ServerDiedError}
        assert logged_errors.pop()

    async def test_can_be_started_again(self, logged_errors: list[str]) -> None:
        """For what that is worth: a server that died is closed, and not broken."""
        model = RecordingModel()
        model.fail_when(lambda td: True, assertion)
        server = InferenceServer(model)
        async with server:
            (error,) = await outcomes(server.async_client()(row(1)))
            assert isinstance(error, ServerDiedError)
        model.fail_when(None)
        async with server:
            assert action(await within(server.async_client()(row(1)))) == 2
        logged_errors.clear()

    async def test_in_threads(self, logged_errors: list[str]) -> None:
        """``shutdown()`` of such a server returns."""
        model = RecordingModel()
        model.fail_when(lambda td: True, assertion)
        server = InferenceServer(model)
        await InThread(server.start)
        thread = InThread(server.sync_client(), row(1))
        (error,) = await outcomes(thread)
        assert isinstance(error, ServerDiedError)
        await InThread(server.shutdown)
        logged_errors.clear()

    @pytest.mark.parametrize(
        "message",
        [
            "CUDA error: invalid configuration argument",
            "CUDA error: no kernel image is available for execution on the device",
            "expected all tensors on one device",
        ],
    )
    async def test_errors_that_pass(self, message: str) -> None:
        """What does not stay is an error of the request, as any other."""
        model = RecordingModel()
        model.fail_when(
            lambda td: bool((td["observation"] < 0).any()), lambda: RuntimeError(message)
        )
        async with InferenceServer(model) as server:
            client = server.async_client()
            well, error = await outcomes(client(row(1)), client(row(-1)))
            assert action(well) == 2
            assert isinstance(error, ModelError)
            assert server.is_alive
