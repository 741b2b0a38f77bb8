"""Capturing and replaying, with a stand-in for the device that records what it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from helpers import action, row, sampling, within
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule

from aioinfer import InferenceServer
from aioinfer.devices import assembly
from aioinfer.devices.assembly import forward_sizes, preparation
from aioinfer.devices.graphs import CudaRecorder, Graphs, Kinds
from aioinfer.sampling import sampling as in_mode
from aioinfer.seeding import Stream
from aioinfer.testing import RecordingModel


class CpuRecorder:
    """Does what a device does: a replay reads the same inputs and writes the same outputs."""

    def __init__(self, *_: Any) -> None:
        self.recorded = 0
        self.replayed = 0
        self.error: Exception | None = None

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.error is not None:
            raise self.error
        self.recorded += 1
        outputs = run()

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for key, leaf in run().items():
                    outputs.get(key).copy_(leaf)

        return replay, outputs


def graphs(call: Any, sizes: tuple[int, ...] = (1, 4), **shared: Any) -> Graphs:
    return Graphs(call, sizes, shared.get("recorder", CpuRecorder()), shared.get("kinds", Kinds()))


def batch(*values: float, key: str = "observation") -> TensorDict:
    return TensorDict({key: torch.tensor(values)}, [len(values)])


class TestGraphs:
    """One graph per size and kind of batch."""

    def test_all_sizes_are_captured_with_the_first_batch(self) -> None:
        """The largest first; then nothing but replays, whatever the size."""
        model, recorder = RecordingModel(), CpuRecorder()
        call = graphs(model, (1, 2, 4), recorder=recorder)
        assert call(batch(1, 2))["action"].tolist() == [2, 4]
        assert model.batch_sizes == [2, 4, 2, 1]  # the batch itself; then they are captured
        assert (recorder.recorded, recorder.replayed) == (3, 0)
        assert call(batch(3))["action"].tolist() == [6]
        assert call(batch(3, 4, 5, 6))["action"].tolist() == [6, 8, 10, 12]
        assert (recorder.recorded, recorder.replayed) == (3, 2)

    def test_addresses_stay(self) -> None:
        """A replay writes where the last one did, and the caller's batch is not written to."""
        call = graphs(RecordingModel())
        call(batch(1))
        first, second = batch(2), batch(3)
        one = call(first)["action"]
        two = call(second)["action"]
        assert one.data_ptr() == two.data_ptr()
        assert first["observation"].item() == 2

    def test_kinds_of_batches(self) -> None:
        """Other names, shapes and dtypes have graphs of their own."""
        recorder = CpuRecorder()
        call = graphs(lambda td: td, recorder=recorder)
        for one in (
            batch(1),
            batch(1, key="other"),
            TensorDict({"observation": torch.zeros(1, 2)}, [1]),
            TensorDict({"observation": torch.zeros(1, dtype=torch.uint8)}, [1]),
        ):
            call(one)
            answer = call(one)
            assert all(answer[key].dtype == leaf.dtype for key, leaf in one.items())
        assert (recorder.recorded, recorder.replayed) == (8, 4)

    def test_kinds_are_bounded(self) -> None:
        """Shapes that keep changing fill no memory; they run as they are."""
        recorder = CpuRecorder()
        call = graphs(lambda td: td, recorder=recorder)
        for width in range(1, 40):
            assert call(TensorDict({"x": torch.ones(1, width)}, [1]))["x"].shape == (1, width)
        assert recorder.recorded == 2 * 16

    @pytest.mark.parametrize(
        "odd",
        [
            TensorDict({"a": {"b": torch.zeros(1)}}, [1]),
            TensorDict({"a": torch.zeros(1), "name": NonTensorData("x", batch_size=[1])}, [1]),
        ],
    )
    def test_what_is_not_plain_runs_as_it_is(self, odd: TensorDictBase) -> None:
        """Nested and non-tensor entries have no fixed addresses."""
        recorder = CpuRecorder()
        call = graphs(lambda td: td, recorder=recorder)
        assert call(odd) is odd
        assert recorder.recorded == 0

    def test_a_policy_that_writes_into_its_batch(self) -> None:
        """The next replay gets what its batch holds, not what the last one left."""

        def writes(td: TensorDictBase) -> TensorDictBase:
            return td.set("action", td["observation"] * 2)

        call = graphs(writes)
        call(batch(1))
        assert [call(batch(value))["action"].item() for value in (2, 3)] == [4, 6]

    def test_other_copies_of_the_policy(self) -> None:
        """Each weight slot has graphs of its own, captured before its first batch."""
        recorder, kinds = CpuRecorder(), Kinds()
        first, second = RecordingModel(), RecordingModel()
        graphs(first, recorder=recorder, kinds=kinds)(batch(1))
        assert recorder.recorded == 2
        call = graphs(second, recorder=recorder, kinds=kinds)
        assert recorder.recorded == 4
        assert second.batch_sizes == [4, 1]
        assert call(batch(5))["action"].item() == 10
        assert recorder.replayed == 1

    def test_what_cannot_be_captured_runs_as_it_is(self, caplog: pytest.LogCaptureFixture) -> None:
        """One warning says why; later batches, of other kinds too, are not tried again."""
        recorder = CpuRecorder()
        recorder.error = RuntimeError("operation not permitted when stream is capturing")
        call = graphs(RecordingModel(lambda td: td), recorder=recorder)
        for one in (batch(1), batch(2), batch(3, key="other")):
            assert call(one) is one
        (record,) = caplog.records
        assert "cannot be captured" in record.getMessage()
        assert "stream is capturing" in record.getMessage()

    def test_a_request_that_fails_is_no_reason(self, caplog: pytest.LogCaptureFixture) -> None:
        """What the policy raises on its first batch is its caller's; the next one is captured."""
        model, recorder = RecordingModel(), CpuRecorder()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        call = graphs(model, recorder=recorder)
        with pytest.raises(ValueError, match="told to fail"):
            call(batch(-1))
        call(batch(1))
        assert recorder.recorded == 2
        assert not caplog.records

    def test_a_device_that_dies_while_capturing(self) -> None:
        """That is no reason to go on without graphs."""
        recorder = CpuRecorder()
        recorder.error = RuntimeError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(RuntimeError, match="illegal memory access"):
            graphs(RecordingModel(), recorder=recorder)(batch(1))

    def test_an_answer_from_elsewhere(self, caplog: pytest.LogCaptureFixture) -> None:
        """What is not computed on the device would be the same for ever: it runs as it is."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            return TensorDict({"action": torch.ones(td.batch_size, device="meta")}, td.batch_size)

        recorder = CpuRecorder()
        call = graphs(policy, recorder=recorder)
        for value in (1, 2):
            call(batch(value))
        assert recorder.replayed == 0
        (record,) = caplog.records
        assert "it answers 'action' from meta" in record.getMessage()

    def test_a_size_without_memory(self, caplog: pytest.LogCaptureFixture) -> None:
        """It runs as it is, and is not tried again; the others are replayed."""

        class Small(CpuRecorder):
            def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
                if len(run()["action"]) == 4:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return super().record(run)

        model, recorder = RecordingModel(), Small()
        call = graphs(model, (1, 2, 4), recorder=recorder)
        call(batch(1))
        for values in ([1], [1, 2], [1, 2, 3, 4], [5, 6, 7, 8]):
            assert call(batch(*values))["action"].tolist() == [2 * value for value in values]
        assert (recorder.recorded, recorder.replayed) == (2, 2)
        (record,) = caplog.records
        assert "no memory to capture 4 rows" in record.getMessage()

    def test_sampling_modes(self) -> None:
        """A mode that requests ask for is captured with it."""
        policy = sampling(InteractionType.RANDOM)
        recorder = CpuRecorder()
        call = graphs(policy, recorder=recorder)
        one = TensorDict({"observation": torch.full((4, 3), 5.0)}, [4])
        for _ in range(2):
            with torch.no_grad(), in_mode(policy, InteractionType.DETERMINISTIC):
                assert (call(one.copy())["action"] == 5).all()
            with torch.no_grad():
                assert not (call(one.copy())["action"] == 5).any()
        assert (recorder.recorded, recorder.replayed) == (4, 2)

    def test_with_a_compiler(self) -> None:
        """What is captured is the compiled policy, in each size."""
        torch._dynamo.reset()
        compiled: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            compiled.append(len(inputs))
            return graph.forward

        policy = TensorDictModule(
            torch.nn.Linear(3, 3), in_keys=["observation"], out_keys=["action"]
        )
        recorder = CpuRecorder()
        call = preparation({"backend": backend, "dynamic": False}, recorder, (2, 4))(policy)
        with torch.no_grad():
            for size in (2, 4, 2):
                asked = TensorDict({"observation": torch.randn(size, 3)}, [size])
                found = call(asked)["action"]
                torch.testing.assert_close(found, policy.module(asked["observation"]))
        assert len(compiled) == 2
        assert (recorder.recorded, recorder.replayed) == (2, 2)

    def test_seeds(self) -> None:
        """Streams of rows are inputs of a graph, so a replay draws what a forward would."""
        policy = TensorDictModule(
            lambda x: x + torch.randn_like(x), in_keys=["observation"], out_keys=["action"]
        )
        call = preparation(None, CpuRecorder(), (1, 4))(policy)
        plain = preparation(None, None, None)(policy)
        one, other = Stream(1), Stream(1)
        for _ in range(3):
            zeros = batch(0, 0, 0, 0)
            found = call(one.attach(zeros))["action"]
            assert torch.equal(found, plain(other.attach(zeros))["action"])


class Captures(FakeCuda):
    """And as much as captures."""

    def __init__(self) -> None:
        super().__init__("forwards", "side")
        self.default_generators: list[Any] = []
        self.capturing = False

    class CUDAGraph:
        was_reset = False

        def replay(self) -> None: ...

        def reset(self) -> None:
            Captures.CUDAGraph.was_reset = True

    def graph_pool_handle(self) -> tuple[int, int]:
        self.calls.append("a pool")
        return (0, 1)

    def device(self, device: torch.device) -> Any:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        assert (pool, capture_error_mode) == ((0, 1), "thread_local")
        self.capturing = True
        self.now = stream
        self.calls.append("capture")
        try:
            yield
        except RuntimeError:  # as torch does: the stream stays what it is
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            ) from None
        finally:
            self.capturing = False


class TestCudaRecorder:
    """What is asked of a device in order to capture."""

    def test_the_order(self) -> None:
        """Warmed up on a stream of its own, then captured there; one pool for all graphs."""
        cuda = Captures()
        recorder = CudaRecorder(torch.device("cuda", 0), cuda)
        for _ in range(2):
            recorder.record(lambda: cuda.calls.append(f"forward on {cuda.now}"))
        one = [
            "side waits for forwards",
            *["forward on side"] * 3,
            "capture",
            "forward on side",
            "forwards waits for side",
        ]
        assert cuda.calls == ["a pool", *one, *one]
        assert str(cuda.now) == "forwards"

    def test_a_capture_that_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        """What the policy did is the reason given, with its place; the thread has its stream."""
        cuda = Captures()

        def reads(td: TensorDictBase) -> TensorDictBase:
            if cuda.capturing:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            return td

        call = graphs(reads, recorder=CudaRecorder(torch.device("cuda", 0), cuda))
        for value in (1, 2, 3):
            one = batch(value)
            assert call(one) is one
        assert str(cuda.now) == "forwards"
        assert cuda.CUDAGraph.was_reset
        (record,) = caplog.records
        assert "operation not permitted when stream is capturing" in record.getMessage()
        assert "test_graphs.py" in record.getMessage()
        assert "raise RuntimeError(" in record.getMessage()

    def test_one_at_a_time(self) -> None:
        """Torch can capture one graph at a time in a process: a second replica waits."""
        cuda = Captures()
        entered = threading.Event()

        def capture(run: Callable[[], Any]) -> None:
            CudaRecorder(torch.device("cuda", 0), cuda).record(run)

        other = threading.Thread(target=capture, args=(entered.set,))

        def first() -> None:
            if cuda.capturing:
                other.start()
                assert not entered.wait(0.05)

        capture(first)
        other.join(10.0)
        assert entered.is_set()


class TestServer:
    """``cuda_graphs=True``, where the device is a stand-in."""

    @pytest.fixture
    def recorders(self, monkeypatch: pytest.MonkeyPatch) -> list[CpuRecorder]:
        """Let the CPU pass for a device that records."""
        made: list[CpuRecorder] = []

        def make(*_: Any) -> CpuRecorder:
            made.append(CpuRecorder())
            return made[-1]

        monkeypatch.setattr(assembly, "CudaRecorder", make)
        monkeypatch.setattr(assembly, "_records", lambda place: True)
        return made

    async def test_serves(self, recorders: list[CpuRecorder]) -> None:
        """Warmed up by its example, a server replays from the first request on."""
        policy = TensorDictModule(
            torch.nn.Linear(3, 3), in_keys=["observation"], out_keys=["action"]
        )
        async with InferenceServer(
            policy, cuda_graphs=True, device="cpu", max_batch_size=6, example=row(0)
        ) as server:
            (recorder,) = recorders
            assert (recorder.recorded, recorder.replayed) == (4, 3)  # 6, 4, 2, 1; and warming up
            clients = [server.async_client() for _ in range(3)]
            asked = [row(value) for value in (1, 2, 3)]
            replies = await within(
                asyncio.gather(*(c(td) for c, td in zip(clients, asked, strict=True)))
            )
            assert recorder.recorded == 4
            assert recorder.replayed > 3
        for td, reply in zip(asked, replies, strict=True):
            with torch.no_grad():
                expected = policy.module(td["observation"])
            torch.testing.assert_close(reply["action"], expected)

    async def test_weights_change_in_place(self, recorders: list[CpuRecorder]) -> None:
        """A replay uses the new weights: their addresses are those that were captured."""
        policy = TensorDictModule(
            torch.nn.Linear(3, 3), in_keys=["observation"], out_keys=["action"]
        )
        async with InferenceServer(policy, cuda_graphs=True, device="cpu") as server:
            client = server.async_client()
            await within(client(row(1)))
            zeros = {key: torch.zeros_like(leaf) for key, leaf in policy.state_dict().items()}
            await within(server.aupdate_model(lambda model: model.load_state_dict(zeros)))
            assert action(await within(client(row(1)))) == 0
        assert recorders[0].replayed == 1

    async def test_replies_belong_to_their_callers(self, recorders: list[CpuRecorder]) -> None:
        """The next replay overwrites no reply."""
        async with InferenceServer(
            _double(), cuda_graphs=True, device="cpu", batch_sizes=[2, 4], max_batch_size=4
        ) as server:
            client = server.async_client()
            replies = [await within(client(row(value))) for value in range(5)]
        assert [action(reply) for reply in replies] == [0, 2, 4, 6, 8]

    def test_needs_a_device(self) -> None:
        """There are no graphs on a CPU."""
        with pytest.raises(ValueError, match="cuda_graphs=True needs CUDA devices, got .'cpu'"):
            InferenceServer(_double(), cuda_graphs=True, device="cpu")
        with pytest.raises(ValueError, match="cuda_graphs=True needs CUDA devices, got .'None'"):
            InferenceServer(_double(), cuda_graphs=True)

    @pytest.mark.parametrize(
        ("largest", "sizes"),
        [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64))],
    )
    def test_sizes(self, largest: int, sizes: tuple[int, ...]) -> None:
        """By default they are the powers of two, and the largest."""
        assert forward_sizes(None, False, True, largest) == sizes
        assert forward_sizes([largest], False, True, largest) == (largest,)
        assert forward_sizes(None, False, False, largest) is None


def _double() -> TensorDictModule:
    return TensorDictModule(lambda x: x * 2, in_keys=["observation"], out_keys=["action"])
