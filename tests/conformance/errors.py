"""Bad requests and bad policies: one error, to that caller alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import InThread, action, doubling, outcomes, row, rows, within
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer import InvalidRequestError, ModelError
from aioinfer.testing import RecordingModel

from .hooks import Hooks

BAD_REQUESTS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "a dict": (lambda: {"observation": torch.zeros(3)}, TypeError, ["TensorDict", "dict"]),
    "a tensor": (lambda: torch.zeros(3), TypeError, ["TensorDict", "Tensor"]),
    "None": (lambda: None, TypeError, ["TensorDict", "NoneType"]),
    "an in_key is missing": (
        lambda: TensorDict({"obs": torch.zeros(3)}),
        InvalidRequestError,
        ["observation", "obs: float32[3]"],
    ),
    "no row": (
        lambda: TensorDict({"observation": torch.zeros(0, 3)}, batch_size=[0]),
        InvalidRequestError,
        ["[0]", "at least one row"],
    ),
    "no row, lazily": (
        lambda: TensorDict({"observation": TensorDict({}, [0])}, batch_size=[0]),
        InvalidRequestError,
        ["[0]", "at least one row"],
    ),
    "two batch dimensions": (
        lambda: TensorDict({"observation": torch.zeros(2, 4, 3)}, batch_size=[2, 4]),
        InvalidRequestError,
        ["[2, 4]", "[K]"],
    ),
    "a device without values": (
        lambda: TensorDict({"observation": torch.zeros(3, device="meta")}),
        InvalidRequestError,
        ["observation", "meta"],
    ),
    "rows that differ": (
        lambda: LazyStackedTensorDict(row(1, width=3), row(2, width=4), stack_dim=0),
        InvalidRequestError,
        ["one by one"],
    ),
}

BAD_ANSWERS: dict[str, tuple[Callable[[TensorDictBase], Any], str]] = {
    "too few rows": (lambda td: td[:-1], r"batch_size \[\d+\] for a batch of \d+ rows"),
    "too many rows": (lambda td: torch.cat([td, td]), r"batch_size \[\d+\] for a batch of"),
    "no batch size": (lambda td: TensorDict({"action": torch.zeros(9)}), r"batch_size \[\]"),
    "None": (lambda td: None, "NoneType"),
    "a tensor": (lambda td: td["observation"], "Tensor"),
    "a dict": (lambda td: {"action": td["observation"]}, "dict"),
}


class Errors(Hooks):
    """Who is told of what."""

    @pytest.mark.parametrize("kind", BAD_REQUESTS)
    async def test_a_bad_request_is_refused_alone(self, kind: str):
        """A request that cannot be served is refused by name; those beside it are answered."""
        make, error, said = BAD_REQUESTS[kind]
        model = RecordingModel(doubling(), in_keys=["observation"], out_keys=["action"])
        async with self.serve(model) as link:
            client = link.client()
            replies = await outcomes(
                client(row(1)), client(make()), client(row(2)), InThread(link.sync_client(), make())
            )
            assert [action(reply) for reply in replies[::2][:2]] == [2, 4]
            for refusal in (replies[1], replies[3]):
                assert type(refusal) is error
                for words in said:
                    assert words in str(refusal)
            assert action(await within(client(row(3)))) == 6
        assert model.rows == 3  # what was refused never came to the policy

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"timeout": -1}, ValueError, ["timeout", "-1"]),
            ({"timeout": math.nan}, ValueError, ["timeout", "nan"]),
            ({"timeout": math.inf}, ValueError, ["timeout", "inf"]),
            ({"timeout": "soon"}, TypeError, ["timeout", "soon"]),
            ({"timeout": True}, TypeError, ["timeout", "True"]),
            ({"priority": "high"}, TypeError, ["priority", "high"]),
            ({"priority": 1.5}, TypeError, ["priority", "1.5"]),
            ({"priority": 10**400}, ValueError, ["priority"]),
            ({"interaction_type": "guess"}, ValueError, ["interaction_type", "guess", "random"]),
            ({"interaction_type": ["mean"]}, ValueError, ["interaction_type", "mean"]),
        ],
    )
    async def test_a_bad_argument_is_refused_alone(
        self, options: dict[str, Any], error: type[Exception], said: list[str]
    ):
        """A bad argument of a call is refused by name and value; the server goes on."""
        async with self.serve(doubling()) as link:
            client, sync_client = link.client(), link.sync_client()

            async def submit() -> Any:
                return await client.submit(row(1), **options)

            for refusal in await outcomes(
                client(row(1), **options),
                submit(),
                InThread(sync_client, row(1), **options),
                InThread(sync_client.submit, row(1), **options),
            ):
                assert type(refusal) is error
                for words in said:
                    assert words in str(refusal)
            assert action(await within(client(row(3)))) == 6

    async def test_what_the_policy_refuses_by_shape_or_type(self):
        """If the policy cannot take a shape or dtype, its caller learns what it does take."""
        policy = TensorDictModule(
            torch.nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"]
        )
        async with self.serve(policy) as link:
            client = link.client()
            await client(row(0))
            wide, whole, good = await outcomes(
                client(row(1, width=5)),
                client(TensorDict({"observation": torch.tensor([1, 2, 3])})),
                client(row(2)),
            )
            for refusal, given in ((wide, "float32[5]"), (whole, "int64[3]")):
                assert type(refusal) is ModelError
                assert given in str(refusal)
                assert "float32[3]" in str(refusal)  # what it has answered
                self.check_cause(refusal, RuntimeError)
            assert good["action"].shape == (2,)

    async def test_a_policy_that_raises_for_one_row(self):
        """Of a batch in which one row makes the policy raise, only that row's caller hears."""
        raised: list[BaseException] = []

        def make_error() -> BaseException:
            raised.append(ValueError("negative observation"))
            return raised[-1]

        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()), make_error)
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(td) for td in (row(1), row(-2), rows([3, 4]), row(5), row(6))]
                await link.queued(6)
            replies = await outcomes(first, *rest)
            assert [action(replies[i]) for i in (0, 1, 3, 4, 5)] == [0, 2, [6, 8], 10, 12]
            assert type(replies[2]) is ModelError
            assert "negative observation" in str(replies[2])
            self.check_cause(replies[2], ValueError, raised)
            assert action(await within(client(row(7)))) == 14
            assert link.server.stats().failed == 1
        assert model.batch_sizes[:2] == [1, 6]  # it was one batch

    async def test_the_rows_of_one_request_fail_together(self):
        """A request of several rows, or a split one, with one bad row gets one error."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        async with self.serve(model, max_batch_size=4) as link:
            client = link.client()
            small, large, good = await outcomes(
                client(rows([1, -1])),
                client(rows([*range(9), -1, *range(9)])),
                client(rows(range(9))),
            )
            assert type(small) is type(large) is ModelError
            assert action(good) == [2 * value for value in range(9)]
            assert link.server.stats().failed == 2
            assert link.server.stats().queue_depth == 0

    async def test_every_caller_gets_an_exception_of_its_own(self):
        """No exception object is given to two callers, so tracebacks do not mix."""
        model = RecordingModel()
        model.fail_when(lambda td: True)
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(row(value)) for value in range(3)]
                threads = [InThread(link.sync_client(), row(value)) for value in range(3)]
                await link.queued(6)
            errors = await outcomes(first, *rest, *threads)
        assert {type(error) for error in errors} == {ModelError}
        assert len({id(error) for error in errors}) == len(errors)
        assert len({id(error.__cause__) for error in errors}) == len(errors)

    @pytest.mark.parametrize("kind", BAD_ANSWERS)
    async def test_an_answer_that_is_none(self, kind: str):
        """Too few or too many rows or a wrong type: everybody is told what was returned."""
        answer, said = BAD_ANSWERS[kind]
        broken = True

        def policy(td: TensorDictBase) -> Any:
            if broken:
                return answer(td)
            return TensorDict({"action": td["observation"] * 2}, td.batch_size)

        model = RecordingModel(policy)
        async with self.serve(model, max_batch_size=8) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(td) for td in (row(1), rows([2, 3]), rows(range(20)))]
                thread = InThread(link.sync_client(), row(4))
                await link.queued(24)
            for error in await outcomes(first, *rest, thread):
                with pytest.raises(ModelError, match=said):
                    raise error
            broken = False
            assert action(await within(client(row(5)))) == 10

    async def test_too_few_rows_never_mean_the_rows_of_others(self):
        """A policy that answers its first row only still gives everybody the own answer."""
        model = RecordingModel(
            lambda td: TensorDict({"action": td["observation"] * 2}, td.batch_size)[:1]
        )
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(row(value)) for value in range(1, 6)]
                await link.queued(5)
            replies = await outcomes(first, *rest)
        assert model.batch_sizes[:2] == [1, 5]
        assert [action(reply) for reply in replies] == [0, 2, 4, 6, 8, 10]

    async def test_an_out_key_that_the_policy_did_not_write(self):
        """A missing out_key is an error that names it."""
        model = RecordingModel(out_keys=["action", "value"])
        async with self.serve(model) as link:
            with pytest.raises(ModelError, match="value"):
                await within(link.client()(row(1)))

    @pytest.mark.parametrize(
        "kind",
        [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, StopIteration],
    )
    async def test_whatever_the_policy_raises(self, kind: type[BaseException]):
        """A policy that exits, is interrupted or cancelled fails its batch, not the server."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()), kind)
        async with self.serve(model) as link:
            client, sync_client = link.client(), link.sync_client()
            for error in await outcomes(
                client(row(-1)), client.submit(row(-1)), InThread(sync_client, row(-1))
            ):
                assert type(error) is ModelError
                self.check_cause(error, kind)
            assert action(await within(client(row(1)))) == 2
            assert action(await InThread(sync_client, row(1))) == 2

    async def test_parts_that_cannot_be_joined(self):
        """If the replies to the parts of a split request do not fit, its caller alone hears."""

        def policy(td: TensorDictBase) -> TensorDictBase:  # as wide as the batch
            return TensorDict({"action": torch.ones(*td.batch_size * 2)}, td.batch_size)

        async with self.serve(policy, max_batch_size=2) as link:
            client, sync_client = link.client(), link.sync_client()
            # One after the other: together, their last rows could share a batch, and fit.
            for ask in (client, lambda td: InThread(sync_client, td)):
                with pytest.raises(ModelError):
                    await within(ask(rows(range(5))))
            assert action(await within(client(row(1)))) == 1
            assert action(await InThread(sync_client, row(1))) == 1

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    @pytest.mark.parametrize("kind", ["sparse", "sparse_csr", "jagged", "nested"])
    async def test_a_tensor_that_cannot_be_cut_into_rows(self, kind: str):
        """Tensors of other layouts, in a request to split, are refused; the server goes on."""
        async with self.serve(doubling(), max_batch_size=2) as link:
            client, sync_client = link.client(), link.sync_client()
            request = TensorDict({"observation": torch.eye(5)}, batch_size=[5])
            request._tensordict["observation"] = _of_layout(kind, request["observation"])
            for error in await outcomes(client(request), InThread(sync_client, request)):
                assert isinstance(error, InvalidRequestError | ModelError)
            assert action(await within(client(row(1)))) == 2
            assert action(await InThread(sync_client, row(1))) == 2


def _of_layout(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    if kind == "sparse":
        return tensor.to_sparse()
    if kind == "sparse_csr":
        return tensor.to_sparse_csr()
    pieces = [line[: 1 + i] for i, line in enumerate(tensor)]
    layout = torch.jagged if kind == "jagged" else torch.strided
    return torch.nested.nested_tensor(pieces, layout=layout)
