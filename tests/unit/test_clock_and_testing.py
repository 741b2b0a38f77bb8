"""The clock, and the public fakes of aioinfer.testing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer, ModelError
from aioinfer.clock import Clock, MonotonicClock
from aioinfer.testing import ManualClock, PuppetExecutor, RecordingModel, settle

TD = TensorDict({"observation": torch.ones(3)})


class Loop:
    """A loop that notes what it is asked for, for clocks that only ask."""

    def __init__(self) -> None:
        self.delays: list[float] = []

    def call_later(self, delay: float, callback: Callable[[], object]) -> object:
        self.delays.append(delay)
        return self


class TestMonotonicClock:
    """The clock of production."""

    def test_is_the_monotonic_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The wall clock, which jumps, plays no role (pitfall 5)."""
        monkeypatch.setattr("time.time", lambda: pytest.fail("the wall clock was read"))
        clock = MonotonicClock()
        assert clock() <= clock()

    def test_a_timer_is_relative_to_this_clock(self) -> None:
        """The delay is taken from the monotonic clock, whatever the loop thinks of time."""
        clock, loop = MonotonicClock(), Loop()
        clock.call_at(loop, clock() + 5.0, lambda: None)  # type: ignore[arg-type]
        (delay,) = loop.delays
        assert 4.0 < delay <= 5.0

    def test_a_timer_in_the_past_is_due_now(self) -> None:
        """No negative delays."""
        clock, loop = MonotonicClock(), Loop()
        clock.call_at(loop, clock() - 5.0, lambda: None)  # type: ignore[arg-type]
        assert loop.delays == [0.0]

    async def test_a_timer_fires_on_its_loop_and_can_be_cancelled(self) -> None:
        """A timer that is due runs; one that was cancelled does not."""
        clock, loop, fired = MonotonicClock(), asyncio.get_running_loop(), asyncio.Event()
        clock.call_at(loop, clock(), lambda: pytest.fail("was cancelled")).cancel()
        clock.call_at(loop, clock(), fired.set)
        async with asyncio.timeout(30.0):
            await fired.wait()


class TestManualClock:
    """Time that passes when told to."""

    def test_is_a_clock(self) -> None:
        """It can stand wherever a clock is asked for."""
        clock: Clock = ManualClock(5)
        assert clock() == 5.0

    def test_stands_still(self) -> None:
        """Only ``advance`` moves it, and only forwards."""
        clock = ManualClock(10.0)
        assert [clock(), clock()] == [10.0, 10.0]
        clock.advance(2.5)
        clock.advance(0.0)
        assert clock() == 12.5

    @pytest.mark.parametrize("seconds", [-1.0, float("nan")])
    def test_does_not_go_back(self, seconds: float) -> None:
        """A negative step is an error that names it."""
        clock = ManualClock(10.0)
        with pytest.raises(ValueError, match=f"at least 0.*got {seconds}"):
            clock.advance(seconds)
        assert clock() == 10.0

    async def test_timers_fire_in_order_at_their_own_time(self) -> None:
        """``advance`` passes through every moment that a timer was armed for."""
        clock, loop, fired = ManualClock(0.0), asyncio.get_running_loop(), []
        for name, when in (("c", 3.0), ("a", 1.0), ("b1", 2.0), ("b2", 2.0), ("late", 9.0)):
            clock.call_at(loop, when, lambda name=name: fired.append((name, clock())))
        clock.advance(5.0)
        assert fired == [("a", 1.0), ("b1", 2.0), ("b2", 2.0), ("c", 3.0)]
        assert clock() == 5.0
        assert clock.timers == [9.0]

    async def test_a_timer_does_not_fire_early(self) -> None:
        """Not before its time, and at its time."""
        clock, loop, fired = ManualClock(0.0), asyncio.get_running_loop(), []
        clock.call_at(loop, 1.0, lambda: fired.append(1))
        clock.advance(0.999)
        await settle()
        assert fired == []
        clock.advance(0.001)
        assert fired == [1]

    async def test_timers_armed_by_timers(self) -> None:
        """What a timer arms within the step fires within the step."""
        clock, loop, fired = ManualClock(0.0), asyncio.get_running_loop(), []

        def again() -> None:
            fired.append(clock())
            clock.call_at(loop, clock() + 1.0, again)

        clock.call_at(loop, 1.0, again)
        clock.advance(3.5)
        assert fired == [1.0, 2.0, 3.0]
        assert clock.timers == [4.0]

    async def test_a_timer_that_is_due_fires_soon_and_not_at_once(self) -> None:
        """As with a loop's own timers, the callback does not run inside of ``call_at``."""
        clock, loop, fired = ManualClock(10.0), asyncio.get_running_loop(), []
        clock.call_at(loop, 10.0, lambda: fired.append("now"))
        clock.call_at(loop, 5.0, lambda: fired.append("past"))
        assert fired == []
        await settle()
        assert fired == ["now", "past"]

    async def test_cancelled_timers_do_not_fire(self) -> None:
        """Neither those that wait nor those on their way to the loop; twice is harmless."""
        clock, loop = ManualClock(0.0), asyncio.get_running_loop()
        waiting = clock.call_at(loop, 1.0, lambda: pytest.fail("was cancelled"))
        on_its_way = clock.call_at(loop, 0.0, lambda: pytest.fail("was cancelled"))
        for timer in (waiting, on_its_way, waiting):
            timer.cancel()
        assert clock.timers == []
        clock.advance(2.0)
        await settle()

    async def test_from_another_thread_timers_fire_on_their_loop(self) -> None:
        """A test thread can move the time of a server that runs elsewhere."""
        clock, loop = ManualClock(0.0), asyncio.get_running_loop()
        fired: asyncio.Future[int] = loop.create_future()
        clock.call_at(loop, 1.0, lambda: fired.set_result(threading.get_ident()))
        await asyncio.to_thread(clock.advance, 1.0)
        async with asyncio.timeout(30.0):
            assert await fired == threading.get_ident()

    async def test_timers_die_with_their_loop(self) -> None:
        """A timer of a loop that was closed is dropped."""
        clock, gone = ManualClock(0.0), asyncio.new_event_loop()
        clock.call_at(gone, 1.0, lambda: pytest.fail("the loop is closed"))
        gone.close()
        clock.call_at(gone, 0.0, lambda: pytest.fail("the loop is closed"))
        clock.advance(2.0)
        assert clock.timers == []

    async def test_decides_when_a_server_times_out(self) -> None:
        """Neither too early nor without being told."""
        clock, model = ManualClock(), RecordingModel()
        puppet = PuppetExecutor()
        async with InferenceServer(
            model, timeout=0.5, min_batch_size=8, clock=clock, executor=puppet
        ) as server:
            with puppet:
                answer = server.async_client().submit(TD)
                await settle()
                clock.advance(0.499)
                await settle()
                assert puppet.waiting == []
                clock.advance(0.001)
                await settle()
                puppet.run_next()
                assert (await answer)["action"].tolist() == [2, 2, 2]


async def test_settle_runs_what_is_due_and_what_that_makes_due() -> None:
    """A chain of callbacks is run to its end, without any time passing."""
    loop, links = asyncio.get_running_loop(), []

    def link() -> None:
        links.append(1)
        if len(links) < 20:
            loop.call_soon(link)

    loop.call_soon(link)
    loop.call_later(3600.0, links.append, 1).cancel()
    await settle()
    assert len(links) == 20


class Forward:
    """A forward on a thread of its own."""

    def __init__(self, model: RecordingModel, value: float = 1.0) -> None:
        self.answer: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(model, value))
        self._thread.start()

    def _run(self, model: RecordingModel, value: float) -> None:
        try:
            td = TensorDict({"observation": torch.full((2, 1), value)}, batch_size=[2])
            self.answer = model(td)
        except BaseException as error:
            self.error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(30.0)
        assert self.is_done


class TestRecordingModel:
    """A policy that remembers, and that can be held and broken."""

    def test_doubles_observations_by_default(self) -> None:
        """The reply of a row is twice its observation."""
        answer = RecordingModel()(TensorDict({"observation": torch.ones(2, 3)}, batch_size=[2]))
        assert answer.batch_size == torch.Size([2])
        assert answer["action"].tolist() == [[2, 2, 2]] * 2

    def test_remembers_its_batches(self) -> None:
        """Sizes and a copy of the inputs, in order."""
        model = RecordingModel()
        for rows in (1, 3):
            td = TensorDict({"observation": torch.ones(rows)}, batch_size=[rows])
            model(td)
            td["observation"].zero_()
        assert (model.batch_sizes, model.rows) == ([1, 3], 4)
        assert [batch["observation"].tolist() for batch in model.batches] == [[1], [1, 1, 1]]
        assert model.threads == {threading.get_ident()}

    def test_any_function_and_keys(self) -> None:
        """It can stand for a policy with in_keys and out_keys."""
        model = RecordingModel(lambda td: td, in_keys=("a",), out_keys=("b",))
        assert (model.in_keys, model.out_keys) == (["a"], ["b"])
        assert model(TD) is TD
        assert (RecordingModel().in_keys, RecordingModel().out_keys) == (None, None)

    def test_a_held_forward_waits_for_its_release(self) -> None:
        """And is recorded when it begins, not when it ends."""
        model = RecordingModel()
        model.hold()
        forward = Forward(model)
        model.wait_until_entered()
        assert model.batch_sizes == [2]
        assert not forward.is_done
        model.release()
        forward.join()
        assert forward.answer["action"].flatten().tolist() == [2, 2]

    def test_release_holds_no_other(self) -> None:
        """Later forwards go through."""
        model = RecordingModel()
        model.hold()
        model.release()
        Forward(model).join()
        model.release()  # harmless

    def test_step_lets_one_forward_go_and_holds_the_next(self) -> None:
        """Two forwards, one after the other, under the test's control."""
        model = RecordingModel()
        with model.held():
            first = Forward(model)
            model.wait_until_entered()
            model.step()
            first.join()
            second = Forward(model)
            model.wait_until_entered()
            assert not second.is_done
        second.join()

    def test_step_needs_a_forward(self) -> None:
        """Letting nothing go is a mistake in the test."""
        model = RecordingModel()
        with pytest.raises(RuntimeError, match="no forward is held"):
            model.step()

    def test_a_forward_released_before_a_new_hold_is_not_caught_again(self) -> None:
        """Releasing and holding again does not catch the forward that was let go."""
        model = RecordingModel()
        model.hold()
        forward = Forward(model)
        model.wait_until_entered()
        model.release()
        model.hold()
        forward.join()
        model.release()

    def test_held_releases_when_the_test_fails(self) -> None:
        """A failing test does not leave a thread behind."""
        model = RecordingModel()
        forward = None
        with pytest.raises(ZeroDivisionError), model.held():
            forward = Forward(model)
            model.wait_until_entered()
            raise ZeroDivisionError
        assert forward is not None
        forward.join()

    def test_a_forgotten_hold_ends_by_itself(self) -> None:
        """After its limit a held forward fails rather than hang."""
        model = RecordingModel()
        model.hold(limit_s=0.0)
        forward = Forward(model)
        forward.join()
        assert isinstance(forward.error, TimeoutError)
        assert "release()" in str(forward.error)

    def test_waiting_in_vain_ends(self) -> None:
        """If no forward begins, the test is told so."""
        model = RecordingModel()
        model.hold()
        with pytest.raises(TimeoutError, match="no forward began within 0.0 s"):
            model.wait_until_entered(0.0)

    async def test_awaiting_in_vain_ends(self) -> None:
        """The same without blocking the loop."""
        model = RecordingModel()
        model.hold()
        with pytest.raises(TimeoutError, match="no forward began within 0.0 s"):
            await model.entered(0.0)

    async def test_waiting_needs_a_hold(self) -> None:
        """A forward that is not held could come and go unseen."""
        model = RecordingModel()
        with pytest.raises(RuntimeError, match="hold"):
            model.wait_until_entered()
        with pytest.raises(RuntimeError, match="hold"):
            await model.entered()

    async def test_entered_does_not_block_the_loop(self) -> None:
        """Coroutines go on while one waits for a forward."""
        model = RecordingModel()
        with model.held():
            waiting = asyncio.create_task(model.entered())
            await settle()
            assert not waiting.done()
            forward = Forward(model)
            await waiting
        await asyncio.to_thread(forward.join)

    async def test_entered_can_be_cancelled(self) -> None:
        """A waiter that leaves harms neither the model nor the others."""
        model = RecordingModel()
        with model.held():
            leaving = asyncio.create_task(model.entered())
            staying = asyncio.create_task(model.entered())
            await settle()
            leaving.cancel()
            forward = Forward(model)
            await staying
        await asyncio.to_thread(forward.join)
        assert leaving.cancelled()

    def test_counts_forwards_at_the_same_time(self) -> None:
        """Two threads in the policy at once are noticed."""
        model = RecordingModel()
        with model.held():
            one, two = Forward(model), Forward(model)
            model.wait_until_entered(forwards=2)
        one.join()
        two.join()
        assert model.most_at_once == 2

    def test_fails_when_told_to(self) -> None:
        """By what is in the batch, with a fresh exception each time, until told otherwise."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        forwards = [Forward(model, value) for value in (-1.0, 1.0, -1.0)]
        for forward in forwards:
            forward.join()
        assert [type(forward.error) for forward in forwards] == [
            ValueError,
            type(None),
            ValueError,
        ]
        assert forwards[0].error is not forwards[2].error
        assert len(model.batches) == 3
        model.fail_when(None)
        healed = Forward(model, -1.0)
        healed.join()
        assert healed.error is None

    def test_fails_as_told_to(self) -> None:
        """With an exception of the test's choice."""
        model = RecordingModel()
        model.fail_when(lambda td: True, lambda: MemoryError("full"))
        with pytest.raises(MemoryError, match="full"):
            model(TD)

    async def test_can_be_served(self) -> None:
        """What arrives during a held forward joins the next batch."""
        model = RecordingModel()
        async with InferenceServer(model) as server:
            client = server.async_client()
            with model.held():
                first = client.submit(TD)
                await model.entered()
                rest = [client.submit(TD) for _ in range(3)]
                await settle()
            await asyncio.gather(first, *rest)
        assert sum(model.batch_sizes[1:]) == 3
        assert model.batch_sizes[0] == 1
        assert threading.get_ident() not in model.threads


class TestPuppetExecutor:
    """Forwards that begin and end when the test says so."""

    async def test_runs_nothing_by_itself(self) -> None:
        """A batch waits until it is told to run."""
        model, puppet = RecordingModel(), PuppetExecutor()
        async with InferenceServer(model, executor=puppet, clock=ManualClock()) as server:
            with puppet:
                answer = server.async_client().submit(TD)
                await settle()
                assert [batch.rows for batch in puppet.waiting] == [1]
                assert (model.batch_sizes, answer.done()) == ([], False)
                batch = puppet.run_next()
                assert (puppet.waiting, puppet.batches) == ([], [batch])
                assert (await answer)["action"].tolist() == [2, 2, 2]
                assert model.threads == {threading.get_ident()}

    async def test_honours_the_servers_options(self) -> None:
        """The forward is the server's own: version, out_keys and all."""
        puppet = PuppetExecutor()
        async with InferenceServer(
            RecordingModel(), executor=puppet, policy_version=7, return_inputs=True
        ) as server:
            with puppet:
                answer = server.async_client().submit(TD)
                await settle()
                puppet.run_next()
                td = await answer
        assert td["policy_version"].item() == 7
        assert "observation" in td

    async def test_given_answers(self) -> None:
        """Results and exceptions of the test's choice, one per request."""
        model, puppet = RecordingModel(), PuppetExecutor()
        async with InferenceServer(
            model, executor=puppet, clock=ManualClock(), min_batch_size=2
        ) as server:
            with puppet:
                client = server.async_client()
                answers = [client.submit(TD), client.submit(TD)]
                await settle()
                result, error = TensorDict({"action": torch.zeros(1)}), ModelError("made up")
                puppet.run_next([result, error])
                assert await answers[0] is result
                with pytest.raises(ModelError, match="made up"):
                    await answers[1]
        assert model.batch_sizes == []

    async def test_one_exception_for_all(self) -> None:
        """Every request gets an exception of its own."""
        puppet = PuppetExecutor()
        async with InferenceServer(
            RecordingModel(), executor=puppet, clock=ManualClock(), min_batch_size=2
        ) as server:
            with puppet:
                client = server.async_client()
                answers = [client.submit(TD), client.submit(TD)]
                await settle()
                puppet.run_next(ModelError("made up"))
                errors = await asyncio.gather(*answers, return_exceptions=True)
        assert [str(error) for error in errors] == ["made up", "made up"]
        assert errors[0] is not errors[1]

    async def test_a_wrong_number_of_answers_is_a_mistake(self) -> None:
        """The test is told, and the batch still waits."""
        puppet = PuppetExecutor()
        async with InferenceServer(RecordingModel(), executor=puppet) as server:
            with puppet:
                answer = server.async_client().submit(TD)
                await puppet.submitted()
                with pytest.raises(ValueError, match="one per request of the batch, 1, got 2"):
                    puppet.run_next([TD, TD])
                assert len(puppet.waiting) == 1
                puppet.run_next([TD])
                assert await answer is TD

    def test_running_nothing_is_a_mistake(self) -> None:
        """There has to be a batch."""
        with pytest.raises(RuntimeError, match="no batch waits"):
            PuppetExecutor().run_next()

    async def test_run_freely_is_an_executor_without_a_thread(self) -> None:
        """Everything that comes is run at once, on the server's loop."""
        model, puppet = RecordingModel(), PuppetExecutor()
        puppet.run_freely()
        async with InferenceServer(model, executor=puppet) as server:
            client = server.async_client()
            answers = await asyncio.gather(*[client(TD) for _ in range(8)])
        assert all(answer["action"].tolist() == [2, 2, 2] for answer in answers)
        assert model.rows == 8
        assert model.threads == {threading.get_ident()}

    async def test_a_test_that_fails_does_not_hang_in_the_server(self) -> None:
        """``with puppet:`` lets a closing server answer what it accepted."""
        puppet = PuppetExecutor()
        answer: asyncio.Future[TensorDictBase] | None = None
        with pytest.raises(ZeroDivisionError):
            async with InferenceServer(RecordingModel(), executor=puppet) as server:
                with puppet:
                    answer = server.async_client().submit(TD)
                    await puppet.submitted()
                    raise ZeroDivisionError
        assert answer is not None
        assert (await answer)["action"].tolist() == [2, 2, 2]

    def test_a_server_in_another_thread(self) -> None:
        """A test thread can wait for a batch and run it."""
        puppet = PuppetExecutor()
        with InferenceServer(RecordingModel(), executor=puppet) as server, puppet:
            future = server.sync_client().submit(TD)
            puppet.wait_until_submitted()
            assert not future.done()
            puppet.run_next()
            assert future.result(30.0)["action"].tolist() == [2, 2, 2]

    async def test_waiting_for_a_batch_in_vain_ends(self) -> None:
        """If none is dispatched, the test is told so."""
        puppet = PuppetExecutor()
        with pytest.raises(TimeoutError, match="no batch was dispatched"):
            await puppet.submitted(0.0)
        with pytest.raises(TimeoutError, match="no batch was dispatched"):
            puppet.wait_until_submitted(0.0)

    async def test_an_update_waits_for_the_batches_before_it(self) -> None:
        """Functions run between batches, in the order of submission."""
        puppet = PuppetExecutor()
        async with InferenceServer(RecordingModel(), executor=puppet) as server:
            with puppet:
                answer = server.async_client().submit(TD)
                await puppet.submitted()
                updating = asyncio.create_task(server.aupdate_model(lambda model: None))
                await settle()
                assert not updating.done()
                puppet.run_next()
                await updating
                assert (await answer)["policy_version"].item() == 0
                assert server.policy_version == 1

    def test_an_update_runs_at_once_where_no_batch_waits(self) -> None:
        """An idle puppet is between batches."""
        assert PuppetExecutor().call(lambda: 5).result(timeout=0) == 5
        failing = PuppetExecutor().call(lambda: 1 // 0)
        assert isinstance(failing.exception(timeout=0), ZeroDivisionError)

    async def test_knows_whether_it_is_in_use(self) -> None:
        """Started by the server, stopped by the server, and usable again."""
        puppet = PuppetExecutor()
        puppet.run_freely()
        for _ in range(2):
            assert not puppet.is_started
            async with InferenceServer(RecordingModel(), executor=puppet) as server:
                assert puppet.is_started
                await server.async_client()(TD)
        assert puppet.batch_sizes == [1, 1]
