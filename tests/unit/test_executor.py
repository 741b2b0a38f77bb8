"""The forward thread, and what one forward does."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictSequential,
)
from tensordict.nn.probabilistic import interaction_type

from aioinfer.batch import Batch
from aioinfer.batching import Reason
from aioinfer.buffers import MIN_NBYTES
from aioinfer.collation import Collator
from aioinfer.errors import ModelError
from aioinfer.executor import ThreadExecutor
from aioinfer.forward import ForwardPass
from aioinfer.request import Request, Source
from aioinfer.sampling import sampling_modules
from aioinfer.signature import describe
from aioinfer.testing import ManualClock, RecordingModel
from aioinfer.weights.slots import Slots

PATIENCE_S = 30.0


def make_request(value: float, mode: InteractionType | None = None, rows: int = 0) -> Request:
    td = TensorDict({"observation": torch.full((2,), float(value))})
    data, count, batched, signature = describe(td.expand(rows) if rows else td, mode)
    return Request(data, count, batched, signature, None, 0, Source(), None)


def make_batch(*requests: Request) -> Batch:
    return Batch(list(requests), sum(r.rows for r in requests), Reason.FULL, dispatched_at=0.0)


def batch_of(*values: float) -> Batch:
    return make_batch(*[make_request(value) for value in values])


def forward_pass(
    model: Callable[[Any], Any],
    *,
    slots: Slots | None = None,
    clock: ManualClock | None = None,
    **options: Any,
) -> ForwardPass:
    defaults: dict[str, Any] = {
        "collate_fn": None,
        "device": None,
        "output_device": None,
        "out_keys": None,
        "version_key": None,
        "return_inputs": False,
    }
    collator = Collator(**{**defaults, **options})
    slots = Slots(model, 0) if slots is None else slots
    return ForwardPass(slots, collator, ManualClock() if clock is None else clock)


def run(forward: ForwardPass, batch: Batch) -> list[Any]:
    """Run a batch; the outcomes, in the order of its requests."""
    forward(batch)
    assert [request for request, _ in batch.outcomes] == batch.requests
    return [outcome for _, outcome in batch.outcomes]


def act(td: TensorDictBase) -> TensorDictBase:
    return TensorDict({"action": td["observation"] * 2}, batch_size=td.batch_size)


class TestForwardPass:
    """Collate, forward, split."""

    def test_every_request_gets_its_own_answer(self) -> None:
        """Outcomes are in the order of the requests, whatever their rows."""
        batch = make_batch(make_request(1), make_request(2, rows=3), make_request(3))
        outcomes = run(forward_pass(act), batch)
        assert [outcome["action"].flatten()[0].item() for outcome in outcomes] == [2, 4, 6]
        assert [tuple(outcome.batch_size) for outcome in outcomes] == [(), (3,), ()]
        assert not batch.failed

    def test_is_one_forward(self) -> None:
        """A batch that succeeds runs the policy once."""
        model = RecordingModel()
        run(forward_pass(model), batch_of(1, 2, 3))
        assert model.batch_sizes == [3]

    def test_gradients_are_off(self) -> None:
        """Replies do not drag a graph along, and can be written to and used for training."""
        weight = torch.nn.Parameter(torch.ones(2))
        forward = forward_pass(
            lambda td: TensorDict({"action": td["observation"] * weight}, td.batch_size)
        )
        (outcome,) = run(forward, batch_of(1))
        assert not outcome["action"].requires_grad
        outcome["action"].add_(1)
        (outcome["action"] * weight).sum().backward()
        assert weight.grad is not None

    def test_times_are_on_the_servers_clock(self) -> None:
        """``forward_s`` is the policy's time; ``answered_at`` is when the batch was done."""
        clock = ManualClock(100.0)

        def slow(td: TensorDictBase) -> TensorDictBase:
            clock.advance(0.25)
            return act(td)

        batch = batch_of(1, 2)
        run(forward_pass(slow, clock=clock), batch)
        assert (batch.forward_s, batch.answered_at) == (0.25, 100.25)

    def test_the_version_is_that_of_the_forward(self) -> None:
        """The stamp is the version of the slot that computed the batch."""
        slots = Slots(act, 3)
        forward = forward_pass(act, slots=slots, version_key="v")
        before = run(forward, batch_of(1))[0]["v"].item()
        slots.update(lambda model: None, mark=True)
        assert (before, run(forward, batch_of(1))[0]["v"].item()) == (3, 4)

    def test_a_policy_may_keep_its_batches(self) -> None:
        """Large batches share memory only with those that nobody holds any more."""
        kept: list[torch.Tensor] = []

        def keeping(td: TensorDictBase) -> TensorDictBase:
            kept.append(td["observation"][:, 0])  # frame stacking, say
            return act(td)

        forward = forward_pass(keeping)
        large = TensorDict({"observation": torch.zeros(MIN_NBYTES)})
        for value in range(5):
            td = large.apply(lambda x, value=value: x + value)
            data, rows, batched, signature = describe(td, None)
            request = Request(data, rows, batched, signature, None, 0, Source(), None)
            answer = run(forward, make_batch(request))[0]
            assert answer["action"][-1].item() == 2 * value
        assert [column.item() for column in kept] == [0, 1, 2, 3, 4]


class TestIsolation:
    """One bad request never fails its neighbours (pitfall 17)."""

    @pytest.mark.parametrize("bad", range(5))
    def test_the_culprit_alone_fails(self, bad: int) -> None:
        """Wherever it stands in the batch, only the bad request gets an error."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        batch = batch_of(*[-1 if i == bad else i for i in range(5)])
        outcomes = run(forward_pass(model), batch)
        assert [isinstance(outcome, ModelError) for outcome in outcomes] == [
            i == bad for i in range(5)
        ]
        good = [i for i in range(5) if i != bad]
        assert [outcomes[i]["action"][0].item() for i in good] == [2 * i for i in good]
        assert batch.failed

    def test_the_search_halves(self) -> None:
        """One culprit among 32 costs a handful of forwards, not 32."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        run(forward_pass(model), batch_of(*[-1 if i == 9 else i for i in range(32)]))
        assert len(model.batch_sizes) == 11

    def test_many_culprits(self) -> None:
        """Every second request is bad, every other one is answered."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        outcomes = run(forward_pass(model), batch_of(1, -1, 2, -1, 3, -1))
        assert [isinstance(outcome, ModelError) for outcome in outcomes] == [False, True] * 3

    def test_k_rows_are_never_torn(self) -> None:
        """A request of K rows fails or succeeds as a whole, and its neighbours are spared."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        batch = make_batch(make_request(1), make_request(-1, rows=3), make_request(2, rows=2))
        outcomes = run(forward_pass(model), batch)
        assert [isinstance(outcome, ModelError) for outcome in outcomes] == [False, True, False]
        assert outcomes[2].batch_size == torch.Size([2])

    def test_a_failure_that_passes_fails_nobody(self) -> None:
        """A forward that fails once and then works, as for lack of memory, costs no request."""
        failures = iter([True])
        model = RecordingModel()
        model.fail_when(lambda td: next(failures, False))
        batch = batch_of(1, 2, 3, 4)
        outcomes = run(forward_pass(model), batch)
        assert not any(isinstance(outcome, BaseException) for outcome in outcomes)
        assert not batch.failed
        assert model.batch_sizes == [4, 2, 2]

    def test_everybody_gets_an_error_of_their_own(self) -> None:
        """No exception object is shared between callers (pitfall 18)."""

        def broken(td: TensorDictBase) -> TensorDictBase:
            raise ValueError("broken")

        outcomes = run(forward_pass(broken), batch_of(1, 2, 3))
        assert len({id(outcome) for outcome in outcomes}) == 3
        assert len({id(outcome.__cause__) for outcome in outcomes}) == 3

    @pytest.mark.parametrize(
        "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()], ids=repr
    )
    def test_the_cause_is_what_the_policy_raised(self, error: BaseException) -> None:
        """Whatever it raises, the thread lives on, and the caller sees the original with its
        traceback (pitfall 19).
        """

        def broken(td: TensorDictBase) -> TensorDictBase:
            raise error

        batch = batch_of(1)
        (outcome,) = run(forward_pass(broken), batch)
        assert isinstance(outcome, ModelError)
        assert outcome.__cause__ is error
        assert error.__traceback__ is not None
        assert repr(error) in str(outcome)
        assert batch.failed

    @pytest.mark.parametrize("extra", [-1, 1])
    def test_too_few_or_too_many_rows_fail_everybody(self, extra: int) -> None:
        """If the policy answers with another number of rows, no row goes to the wrong caller
        and nobody is left without an answer (pitfall 20).
        """

        def miscounts(td: TensorDictBase) -> TensorDictBase:
            n = td.batch_size[0] + extra
            return TensorDict({"action": torch.zeros(n)}, batch_size=[n])

        outcomes = run(forward_pass(miscounts), batch_of(1, 2, 3))
        assert all(isinstance(outcome, ModelError) for outcome in outcomes)

    def test_a_wrong_type_fails_everybody(self) -> None:
        """A policy that returns a bare tensor is told what was expected."""
        outcomes = run(forward_pass(lambda td: td["observation"]), batch_of(1, 2))
        assert all("returned Tensor" in str(outcome) for outcome in outcomes)
        assert all("expected a TensorDict" in str(outcome) for outcome in outcomes)

    def test_a_bad_collate_fn_fails_the_requests_and_not_the_thread(self) -> None:
        """Errors before the policy are handled like errors in it."""

        def collate_fn(tds: list[TensorDictBase]) -> TensorDictBase:
            raise RuntimeError("no")

        outcomes = run(forward_pass(act, collate_fn=collate_fn), batch_of(1, 2))
        assert [str(outcome.__cause__) for outcome in outcomes] == ["no", "no"]


class TestErrorText:
    """What the caller of a failed request reads."""

    def test_names_the_request(self) -> None:
        """The looks of the request are in the message."""
        (outcome,) = run(forward_pass(lambda td: td["missing"]), batch_of(1))
        assert "observation: float32[2]" in str(outcome)

    def test_says_what_was_answered_before(self) -> None:
        """A request unlike those that work is shown what those looked like."""
        model = RecordingModel()
        model.fail_when(lambda td: td["observation"].shape[-1] != 2)
        forward = forward_pass(model)
        run(forward, batch_of(1))
        data, rows, batched, signature = describe(TensorDict({"observation": torch.zeros(5)}), None)
        odd = Request(data, rows, batched, signature, None, 0, Source(), None)
        (outcome,) = run(forward, make_batch(odd))
        assert "observation: float32[5]" in str(outcome)
        assert "observation: float32[2]" in str(outcome)

    def test_does_not_blame_looks_that_have_worked(self) -> None:
        """If such requests were answered before, the looks are not the reason."""
        model = RecordingModel()
        forward = forward_pass(model)
        run(forward, batch_of(1))
        model.fail_when(lambda td: True)
        (outcome,) = run(forward, batch_of(1))
        assert "has answered" not in str(outcome)

    def test_what_was_answered_is_remembered_in_moderation(self) -> None:
        """Looks that keep changing fill neither memory nor messages."""
        model = RecordingModel(lambda td: td)
        forward = forward_pass(model)
        for i in range(50):
            data, rows, batched, signature = describe(TensorDict({f"x{i}": torch.zeros(1)}), None)
            run(forward, make_batch(Request(data, rows, batched, signature, None, 0, Source(), 0)))
        model.fail_when(lambda td: True)
        (outcome,) = run(forward, batch_of(1))
        assert "x49" in str(outcome)
        assert "x0:" not in str(outcome)
        assert len(str(outcome)) < 1000


def sampling_policy() -> TensorDictSequential:
    """A policy with a normal distribution: deterministic gives its mean."""
    return TensorDictSequential(
        TensorDictModule(
            lambda x: (x, torch.ones_like(x)), in_keys=["observation"], out_keys=["loc", "scale"]
        ),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=torch.distributions.Normal,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


class TestSampling:
    """The sampling mode of a request."""

    def test_deterministic_gives_the_mean(self) -> None:
        """The mode reaches the policy's distribution."""
        forward = forward_pass(sampling_policy(), out_keys=["action"])
        request = make_request(3, InteractionType.DETERMINISTIC)
        (outcome,) = run(forward, make_batch(request))
        assert outcome["action"].tolist() == [3, 3]

    def test_random_samples(self) -> None:
        """And back again: the mode of one batch does not stick."""
        forward = forward_pass(sampling_policy(), out_keys=["action"])
        run(forward, make_batch(make_request(3, InteractionType.DETERMINISTIC)))
        (outcome,) = run(forward, make_batch(make_request(3, InteractionType.RANDOM)))
        assert outcome["action"].tolist() != [3, 3]

    def test_none_leaves_it_to_the_policy(self) -> None:
        """Without a mode the policy's own default rules."""
        policy = sampling_policy()
        (module,) = sampling_modules(policy)
        module.default_interaction_type = InteractionType.DETERMINISTIC
        (outcome,) = run(forward_pass(policy, out_keys=["action"]), batch_of(3))
        assert outcome["action"].tolist() == [3, 3]

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_policys_default_is_put_back(self, fails: bool) -> None:
        """After the forward, and after one that failed, the policy is as it was."""
        policy = sampling_policy()
        (module,) = sampling_modules(policy)
        forward = forward_pass(policy, out_keys=["action", "nothing"] if fails else ["action"])
        batch = make_batch(make_request(3, InteractionType.DETERMINISTIC))
        run(forward, batch)
        assert batch.failed is fails
        assert module.default_interaction_type is InteractionType.RANDOM

    def test_other_threads_are_left_alone(self) -> None:
        """No process-wide variable is set: a learner samples as before (pitfall 30)."""
        seen = []

        class Spy(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.policy = sampling_policy()

            def forward(self, td: TensorDictBase) -> TensorDictBase:
                seen.append(interaction_type())
                return self.policy(td)

        before = interaction_type()
        run(forward_pass(Spy()), make_batch(make_request(3, InteractionType.DETERMINISTIC)))
        assert seen == [before]

    def test_a_callable_has_no_sampling_modules(self) -> None:
        """Only modules can be searched for distributions."""
        assert sampling_modules(act) == []
        assert len(sampling_modules(sampling_policy())) == 1


class Finished:
    """Collects the batches that an executor reports."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.threads: list[int] = []
        self._bell = threading.Condition()

    def __call__(self, batch: Batch) -> None:
        with self._bell:
            self.batches.append(batch)
            self.threads.append(threading.get_ident())
            self._bell.notify_all()

    def wait_for(self, count: int) -> None:
        with self._bell:
            assert self._bell.wait_for(lambda: len(self.batches) >= count, PATIENCE_S)


@pytest.fixture
def finished() -> Finished:
    return Finished()


@pytest.fixture
def model() -> RecordingModel:
    return RecordingModel()


class TestThreadExecutor:
    """One thread."""

    def test_batches_run_in_order_on_one_thread_of_its_own(
        self, model: RecordingModel, finished: Finished
    ) -> None:
        """Every batch is run and reported, first come first, never two at a time."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        batches = [batch_of(i) for i in range(20)]
        for batch in batches:
            executor.submit(batch)
        executor.stop().result(PATIENCE_S)
        assert finished.batches == batches
        assert model.threads == set(finished.threads)
        assert len(model.threads) == 1
        assert threading.get_ident() not in model.threads
        assert model.most_at_once == 1

    def test_it_computes_on_as_many_cores_as_torch_was_told(self, finished: Finished) -> None:
        """``torch.set_num_threads`` counts, though OpenMP keeps the number for each thread."""
        found = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
        if not found:
            pytest.skip("torch was not built with this OpenMP")
        cores: list[int] = []

        def policy(td: TensorDictBase) -> TensorDictBase:
            cores.append(ctypes.CDLL(str(found[0])).omp_get_max_threads())
            return td

        before = torch.get_num_threads()
        try:
            for number in (1, 3):
                torch.set_num_threads(number)
                executor = ThreadExecutor()
                executor.start(forward_pass(policy), finished)
                executor.submit(batch_of(1))
                executor.stop().result(PATIENCE_S)
        finally:
            torch.set_num_threads(before)
        assert cores == [1, 3]

    def test_a_batch_is_reported_after_it_has_its_outcomes(
        self, model: RecordingModel, finished: Finished
    ) -> None:
        """What is reported is complete."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        with model.held():
            batch = batch_of(1)
            executor.submit(batch)
            model.wait_until_entered(PATIENCE_S)
            assert finished.batches == []
        executor.stop().result(PATIENCE_S)
        assert finished.batches == [batch]
        assert batch.outcomes[0][1]["action"].tolist() == [2, 2]

    def test_a_policy_that_raises_anything_does_not_end_it(self, finished: Finished) -> None:
        """The thread survives SystemExit from a policy (pitfall 19)."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()), lambda: SystemExit(1))
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        executor.submit(batch_of(-1))
        executor.submit(batch_of(1))
        executor.stop().result(PATIENCE_S)
        assert [batch.failed for batch in finished.batches] == [True, False]

    def test_stop_finishes_what_was_submitted(
        self, model: RecordingModel, finished: Finished
    ) -> None:
        """Nothing that was accepted is dropped, and stopping does not block the caller."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        with model.held():
            for i in range(3):
                executor.submit(batch_of(i))
            model.wait_until_entered(PATIENCE_S)
            stopped = executor.stop()
            assert not stopped.done()
        stopped.result(PATIENCE_S)
        assert len(finished.batches) == 3

    def test_the_end_cannot_be_cancelled(self, model: RecordingModel, finished: Finished) -> None:
        """Somebody who stops waiting for the end does not break the thread that ends."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        stopped = executor.stop()
        stopped.cancel()
        stopped.result(PATIENCE_S)

    def test_can_be_started_again(self, model: RecordingModel, finished: Finished) -> None:
        """A stopped executor starts anew, with another function to run."""
        executor = ThreadExecutor()
        other = RecordingModel()
        for policy in (model, other):
            executor.start(forward_pass(policy), finished)
            executor.submit(batch_of(1))
            executor.stop().result(PATIENCE_S)
        assert (model.batch_sizes, other.batch_sizes) == ([1], [1])

    def test_two_lives_never_run_at_once(self, model: RecordingModel, finished: Finished) -> None:
        """A forward left over from before a restart ends before the next begins: two threads
        never use the model together (pitfall 23).
        """
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        with model.held():
            executor.submit(batch_of(1))
            model.wait_until_entered(PATIENCE_S)
            executor.stop()
            executor.start(forward_pass(model), finished)
            executor.submit(batch_of(2))
            assert len(model.batch_sizes) == 1
        finished.wait_for(2)
        executor.stop().result(PATIENCE_S)
        assert model.most_at_once == 1
        assert [int(batch["observation"][0, 0]) for batch in model.batches] == [1, 2]

    def test_keeps_no_batch_when_idle(self, model: RecordingModel) -> None:
        """The last batch, with its tensors, is let go of as soon as it was reported."""

        class Weak(Batch):
            pass

        executor = ThreadExecutor()
        reported = threading.Event()
        executor.start(forward_pass(model), lambda batch: None)
        batch = Weak([make_request(1)], 1, Reason.FULL, 0.0)
        gone = weakref.ref(batch)
        executor.submit(batch)
        del batch
        executor.call(reported.set).result(PATIENCE_S)  # the thread has gone on
        gc.collect()
        assert gone() is None
        executor.stop().result(PATIENCE_S)


class TestCall:
    """Functions between batches."""

    def test_runs_between_batches(self, model: RecordingModel, finished: Finished) -> None:
        """After what was submitted before, before what comes after, on the same thread."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        with model.held():
            executor.submit(batch_of(1))
            model.wait_until_entered(PATIENCE_S)
            called = executor.call(lambda: (list(model.batch_sizes), threading.get_ident()))
            executor.submit(batch_of(2, 3))
            assert not called.done()
        sizes, thread = called.result(PATIENCE_S)
        executor.stop().result(PATIENCE_S)
        assert sizes == [1]
        assert {thread} == model.threads

    def test_its_exception_reaches_the_caller_and_not_the_thread(
        self, model: RecordingModel, finished: Finished
    ) -> None:
        """A function that raises harms nobody else (pitfall 29)."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        for error in (ValueError("no"), SystemExit(2)):

            def fail(error: BaseException = error) -> None:
                raise error

            with pytest.raises(type(error)) as caught:
                executor.call(fail).result(PATIENCE_S)
            assert caught.value is error
        executor.submit(batch_of(1))
        executor.stop().result(PATIENCE_S)
        assert len(finished.batches) == 1

    def test_runs_at_once_before_the_start(self) -> None:
        """Without a thread it runs on the caller's."""
        future = ThreadExecutor().call(threading.get_ident)
        assert future.result(timeout=0) == threading.get_ident()

    def test_runs_at_once_after_the_end(self, model: RecordingModel, finished: Finished) -> None:
        """The policy of a stopped server can still be changed."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        executor.stop().result(PATIENCE_S)
        assert executor.call(lambda: 5).result(PATIENCE_S) == 5

    def test_does_not_run_beside_the_last_forward(
        self, model: RecordingModel, finished: Finished
    ) -> None:
        """While a stopped executor still computes, the function waits, its caller does not."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        with model.held():
            executor.submit(batch_of(1))
            model.wait_until_entered(PATIENCE_S)
            executor.stop()
            called = executor.call(lambda: len(finished.batches))
            assert not called.done()
        assert called.result(PATIENCE_S) == 1

    def test_from_its_own_thread_runs_at_once(self, finished: Finished) -> None:
        """A policy that calls back does not wait for itself."""
        executor = ThreadExecutor()
        values = []

        def calls_back(td: TensorDictBase) -> TensorDictBase:
            values.append(executor.call(lambda: 7).result(timeout=0))
            return act(td)

        executor.start(forward_pass(calls_back), finished)
        executor.submit(batch_of(1))
        executor.stop().result(PATIENCE_S)
        assert values == [7]

    def test_can_be_cancelled_while_it_waits(
        self, model: RecordingModel, finished: Finished
    ) -> None:
        """A function that nobody wants any more is not run."""
        executor = ThreadExecutor()
        executor.start(forward_pass(model), finished)
        ran = []
        with model.held():
            executor.submit(batch_of(1))
            model.wait_until_entered(PATIENCE_S)
            called = executor.call(lambda: ran.append(1))
            assert called.cancel()
        executor.stop().result(PATIENCE_S)
        assert ran == []
