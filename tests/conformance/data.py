"""What a request may hold and what a reply holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from helpers import InThread, action, doubling, outcomes, row, rows, within
from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    tensorclass,
)
from tensordict.nn import TensorDictModule

from aioinfer.testing import RecordingModel

from .hooks import Hooks


@tensorclass
class Observed:
    """A request of a type of its own."""

    observation: torch.Tensor


@tensorclass
class Acted:
    """A reply of a type of its own."""

    action: torch.Tensor


class Data(Hooks):
    """Kinds of requests and replies."""

    async def test_nested_tensordicts(self):
        """Nested entries travel both ways, as a row, as several rows, split and joined."""
        policy = TensorDictModule(
            lambda x, y: x + y,
            in_keys=[("agents", "observation"), "offset"],
            out_keys=[("agents", "action")],
        )

        def request(values: list[float]) -> TensorDict:
            one = [
                TensorDict(
                    {"agents": {"observation": torch.full((2,), v)}, "offset": torch.ones(2)}
                )
                for v in values
            ]
            return torch.stack(one)

        async with self.serve(policy, max_batch_size=4) as link:
            client = link.client()
            replies = await outcomes(
                client(request([1.0])[0]),
                client(request([2.0, 3.0])),
                client(request([float(v) for v in range(10)])),
                InThread(link.sync_client(), request([4.0])[0]),
            )
        actions = [reply["agents", "action"][..., 0].tolist() for reply in replies]
        assert actions == [2, [3, 4], [v + 1 for v in range(10)], 5]
        assert ("agents", "observation") not in replies[0].keys(include_nested=True)

    async def test_non_tensor_data(self):
        """Strings and other objects travel both ways, each to its own caller."""

        def greet(td: TensorDictBase) -> TensorDictBase:
            names = td.get("name").tolist()
            greetings = [NonTensorData(f"hello {name}") for name in names]
            return TensorDict(
                {"action": td["observation"] * 2, "greeting": NonTensorStack(*greetings)},
                td.batch_size,
            )

        def request(number: int) -> TensorDict:
            td = row(number)
            td["name"] = f"actor {number}"
            return td

        async with self.serve(greet, max_batch_size=4) as link:
            client = link.client()
            replies = await outcomes(*(client(request(number)) for number in range(6)))
            assert [reply["greeting"] for reply in replies] == [
                f"hello actor {number}" for number in range(6)
            ]
            several = torch.stack([request(number) for number in range(6)])
            reply = await within(client(several))  # split and joined
            assert reply.get("greeting").tolist() == [f"hello actor {n}" for n in range(6)]
            assert action(reply) == [0, 2, 4, 6, 8, 10]

    async def test_tensorclasses(self):
        """A tensorclass reaches the policy as what it is, and one that it returns comes back."""
        kinds = set()

        def policy(observed: Any) -> Any:
            kinds.add(type(observed))
            return Acted(action=observed.observation * 2, batch_size=observed.batch_size)

        async with self.serve(policy, policy_version_key=None, max_batch_size=4) as link:
            client = link.client()
            replies = await outcomes(
                client(Observed(observation=torch.full((3,), 1.0), batch_size=[])),
                client(Observed(observation=torch.full((2, 3), 2.0), batch_size=[2])),
                client(Observed(observation=torch.full((9, 3), 3.0), batch_size=[9])),
            )
        assert kinds == {Observed}
        assert [type(reply) for reply in replies] == [Acted] * 3
        assert [reply.action[..., 0].tolist() for reply in replies] == [2, [4] * 2, [6] * 9]

    async def test_a_tensorclass_and_a_tensordict_with_the_same_fields(self):
        """Requests of different types at the same time each get their own answer."""

        def policy(observed: Any) -> Any:
            return TensorDict({"action": observed.get("observation") * 2}, observed.batch_size)

        async with self.serve(policy) as link:
            client = link.client()
            replies = await outcomes(
                client(Observed(observation=torch.full((3,), 1.0), batch_size=[])),
                client(row(2)),
                client(TensorDict({"observation": torch.nn.Parameter(torch.full((3,), 3.0))})),
                client(Observed(observation=torch.full((3,), 4.0), batch_size=[])),
            )
        assert [action(reply) for reply in replies] == [2, 4, 6, 8]

    async def test_lazy_stacks(self):
        """A lazy stack is a request of several rows like any other."""
        async with self.serve(doubling(), max_batch_size=4) as link:
            client = link.client()
            lazy = LazyStackedTensorDict(*(row(value) for value in range(3)), stack_dim=0)
            long = LazyStackedTensorDict(*(row(value) for value in range(9)), stack_dim=0)
            replies = await outcomes(
                client(lazy), client(row(7)), client(long), InThread(link.sync_client(), lazy)
            )
        assert [action(reply) for reply in replies] == [
            [0, 2, 4],
            14,
            [2 * value for value in range(9)],
            [0, 2, 4],
        ]

    async def test_a_row_without_entries(self):
        """A policy that needs no input serves empty requests."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            return TensorDict({"action": torch.ones(*td.batch_size, 1)}, td.batch_size)

        async with self.serve(policy) as link:
            assert action(await link.client()(TensorDict({}))) == 1
            assert action(await link.client()(TensorDict({}, batch_size=[2]))) == [1, 1]

    # -- the reply ----------------------------------------------------------

    async def test_the_reply_holds_the_out_keys_and_the_version_only(self):
        """The observation is not echoed."""
        async with self.serve(doubling()) as link:
            for td in (row(1), rows([1, 2])):
                reply = await link.client()(td)
                assert set(reply.keys()) == {"action", "policy_version"}

    async def test_return_inputs(self):
        """With ``return_inputs``, the request's own entries come back with the answer."""
        async with self.serve(doubling(), return_inputs=True, max_batch_size=4) as link:
            client = link.client()
            extra = row(1)
            extra["tag"] = torch.tensor(7)
            extra["nested", "tag"] = torch.tensor(8)
            replies = await outcomes(client(extra), client(rows([2, 3])), client(rows(range(6))))
        assert replies[0]["tag"] == 7
        assert replies[0]["nested", "tag"] == 8
        assert [reply["observation"][..., 0].tolist() for reply in replies] == [
            1,
            [2, 3],
            [0, 1, 2, 3, 4, 5],
        ]
        assert [action(reply) for reply in replies] == [2, [4, 6], [0, 2, 4, 6, 8, 10]]
        assert set(extra.keys()) == {"observation", "tag", "nested"}  # not written into

    async def test_a_policy_without_out_keys_answers_with_what_it_returned(self):
        """Without ``out_keys`` the reply is all that the policy returned."""
        replies = []
        async with self.serve(lambda td: td.set("action", td["observation"] * 2)) as link:
            replies.append(await link.client()(row(1)))
            replies.append(await link.client()(rows([1, 2])))
        for reply in replies:
            assert set(reply.keys()) == {"observation", "action", "policy_version"}
        assert [action(reply) for reply in replies] == [2, [2, 4]]

    async def test_the_version_is_stamped(self):
        """A reply says in ``policy_version`` which version computed it, for every row."""
        async with self.serve(doubling(), policy_version=7) as link:
            reply = await link.client()(row(1))
            assert reply["policy_version"].dtype == torch.int64
            assert reply["policy_version"].shape == ()
            assert reply["policy_version"] == 7
            reply = await link.client()(rows([1, 2]))
            assert reply["policy_version"].tolist() == [7, 7]

    async def test_the_version_can_be_left_out(self):
        """``policy_version_key=None`` leaves the reply to the policy."""
        async with self.serve(doubling(), policy_version_key=None) as link:
            assert set((await link.client()(row(1))).keys()) == {"action"}

    async def test_the_version_under_a_nested_key(self):
        """``policy_version_key`` may be a nested key."""
        async with self.serve(doubling(), policy_version_key=("info", "version")) as link:
            for td, version in ((row(1), 0), (rows([1, 2]), [0, 0])):
                reply = await link.client()(td)
                assert reply["info", "version"].tolist() == version
                assert set(reply.keys()) == {"action", "info"}

    async def test_replies_do_not_share_memory(self):
        """An in-place change by one caller reaches no other, even if the policy expanded."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            shared = torch.zeros(1, 3).expand(*td.batch_size, 3)
            return TensorDict({"action": shared, "nested": {"same": shared}}, td.batch_size)

        model = RecordingModel(policy)
        plain = RecordingModel(lambda td: policy(td).exclude("nested"))
        for served in (model, plain):
            async with self.serve(served) as link:
                client = link.client()
                with served.held():
                    first = client.submit(row(0))
                    await served.entered()
                    rest = [client.submit(td) for td in (row(1), row(2), rows([3, 4]))]
                    await link.queued(4)
                _, one, other, both = await outcomes(first, *rest)
            assert served.batch_sizes == [1, 4]
            one["action"].add_(1)
            both["action"][0].add_(5)
            assert other["action"].tolist() == [0, 0, 0]
            assert both["action"][1].tolist() == [0, 0, 0]

    @pytest.mark.parametrize("count", [1, 2])
    async def test_replies_do_not_share_memory_with_the_policy(self, count: int):
        """An in-place change by a caller does not reach what the policy keeps."""
        kept = torch.zeros(3)

        def policy(td: TensorDictBase) -> TensorDictBase:
            return TensorDict({"action": kept.expand(*td.batch_size, 3)}, td.batch_size)

        async with self.serve(policy) as link:
            reply = await link.client()(rows(range(count)))
            reply["action"].add_(1)
            if count == 1:
                (await link.client()(row(0)))["action"].add_(1)
            assert kept.tolist() == [0, 0, 0]

    async def test_a_policy_may_reuse_its_output(self):
        """A policy that always answers in the same memory does not change earlier replies."""
        memory = torch.zeros(1, 3)

        def policy(td: TensorDictBase) -> TensorDictBase:
            torch.mul(td["observation"], 2, out=memory)
            return TensorDict({"action": memory}, td.batch_size)

        async with self.serve(policy, max_batch_size=1) as link:
            client = link.client()
            replies = [await client(row(1)), await client(rows([2])), await client(row(3))]
            assert [action(reply) for reply in replies] == [2, [4], 6]
            replies[2]["action"].add_(1)
            assert memory.tolist() == [[6, 6, 6]]

    async def test_a_policy_may_write_into_its_batch(self):
        """What the policy changes in place is its batch and not the caller's tensors."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            td["observation"].mul_(2)
            return TensorDict({"action": td["observation"]}, td.batch_size)

        nested = row(4)
        nested["more", "entry"] = torch.ones(1)
        lazy = LazyStackedTensorDict(row(5), row(6), stack_dim=0)
        requests = [row(1), rows([2]), rows([3] * 5), nested, lazy]
        before = [request.clone() for request in requests]
        async with self.serve(policy, max_batch_size=4) as link:
            for request in requests:
                reply = await within(link.client()(request))
                assert torch.equal(reply["action"], 2 * request["observation"])
        for request, original in zip(requests, before, strict=True):
            assert (request == original).all()

    async def test_replies_are_ordinary_tensors(self):
        """A reply carries no graph, and may take part in one of the caller's."""
        policy = TensorDictModule(
            torch.nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"]
        )
        async with self.serve(policy) as link:
            reply = await link.client()(row(1))
        assert not reply["action"].requires_grad
        weight = torch.ones(2, requires_grad=True)
        (reply["action"] * weight).sum().backward()
        assert torch.equal(weight.grad, reply["action"])
        reply["action"].add_(1)

    async def test_a_request_may_come_from_a_graph(self):
        """A tensor that requires grad may be sent; the answer is computed without a graph."""
        tensor = torch.ones(3, requires_grad=True)
        async with self.serve(doubling()) as link:
            replies = await asyncio.gather(
                link.client()(TensorDict({"observation": tensor * 1})),
                link.client()(TensorDict({"observation": tensor.detach()})),
            )
        assert [action(reply) for reply in replies] == [2, 2]
        assert not any(reply["action"].requires_grad for reply in replies)
