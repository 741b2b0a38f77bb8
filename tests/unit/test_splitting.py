"""Requests larger than a batch: split on the way in, joined on the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.batching import Batcher, Dispatch
from aioinfer.collation import tensordict_of
from aioinfer.errors import ModelError
from aioinfer.request import Request, Source, State
from aioinfer.signature import describe
from aioinfer.splitting import split


class Port:
    """A reply port that remembers its answers."""

    takes_columns = False

    def __init__(self, *, on_loop: bool = True) -> None:
        self.on_loop = on_loop
        self.answers: list[tuple[Request, Any]] = []

    def deliver(self, outcomes: Sequence[tuple[Request, Any]]) -> None:
        self.answers.extend(outcomes)


def large_request(td: Any, port: Port | None = None, priority: int = 0) -> Request:
    data, rows, batched, signature = describe(td, None)
    request = Request(data, rows, batched, signature, 2.5, priority, Source(), object())
    request.submitted_at, request.deadline = 10.0, 12.5
    request.port = Port() if port is None else port
    return request


def observations(n: int) -> TensorDict:
    return TensorDict({"observation": torch.arange(n)}, batch_size=[n])


def answer_to(part: Request) -> TensorDict:
    """What a policy would answer: the observation, doubled."""
    td = tensordict_of(part)
    return TensorDict({"action": td["observation"] * 2}, batch_size=td.batch_size)


class TestSplit:
    """On the way in."""

    @pytest.mark.parametrize(
        ("rows", "most", "expected"),
        [(7, 4, [4, 3]), (8, 4, [4, 4]), (9, 4, [4, 4, 1]), (3, 1, [1, 1, 1]), (3, 2, [2, 1])],
    )
    def test_parts_are_as_large_as_allowed(self, rows: int, most: int, expected: list[int]) -> None:
        """All parts but the last are full, and no row is lost."""
        request = large_request(observations(rows))
        parts = split(request, most)
        assert [part.rows for part in parts] == expected
        seen = torch.cat([tensordict_of(part)["observation"] for part in parts])
        assert seen.tolist() == list(range(rows))
        assert request.parts == parts

    def test_nested_requests_are_split_alike(self) -> None:
        """Requests that are not plain are cut by rows too."""
        request = large_request(TensorDict({"in": observations(5)}, batch_size=[5]))
        parts = split(request, 2)
        assert [part.data["in", "observation"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]

    def test_parts_inherit_what_decides_their_service(self) -> None:
        """A part is as old, as urgent and of the same kind as the whole."""
        request = large_request(observations(5), priority=3)
        for part in split(request, 2):
            assert part.submitted_at == 10.0
            assert (part.timeout, part.deadline) == (2.5, 12.5)
            assert part.priority == 3
            assert part.signature is request.signature
            assert part.batched
            assert part.whole is request
            assert part.port.on_loop

    def test_a_split_request_counts_as_one_caller(self) -> None:
        """Its parts are awaited by one caller, who asks again only once: the last part does not
        wait for the others to come back, and afterwards one request is expected.
        """
        batcher = Batcher(max_batch_size=4, min_batch_size=None, timeout=0.002, max_queue_size=1000)
        request = large_request(observations(10))
        batcher.join(request.source)
        for part in split(request, 4):
            batcher.push(part)
        left = []
        while batcher.rows:
            dispatch = batcher.next_action(10.0)
            assert isinstance(dispatch, Dispatch)
            left.append(dispatch.rows)
            batcher.forward_ended(dispatch.requests, 10.0)
        assert left == [4, 4, 2]
        assert request.source.expected == 1

    def test_the_side_of_the_thread_border_is_kept(self) -> None:
        """The parts are answered where the whole would have been."""
        request = large_request(observations(5), Port(on_loop=False))
        assert not any(part.port.on_loop for part in split(request, 2))

    def test_rows_are_views(self) -> None:
        """Splitting copies no tensor."""
        td = observations(4)
        parts = split(large_request(td), 2)
        assert parts[1].data[0].data_ptr() == td["observation"][2:].data_ptr()


class TestJoin:
    """On the way out."""

    def test_the_last_answer_answers_the_whole(self) -> None:
        """One answer, once all parts are there, with the batch size of the request."""
        port = Port()
        request = large_request(observations(5), port)
        parts = split(request, 2)
        for part in parts[:-1]:
            part.port.deliver([(part, answer_to(part))])
            assert port.answers == []
        parts[-1].port.deliver([(parts[-1], answer_to(parts[-1]))])
        ((whole, joined),) = port.answers
        assert whole is request
        assert joined.batch_size == torch.Size([5])
        assert joined["action"].tolist() == [0, 2, 4, 6, 8]
        assert request.state is State.DONE

    def test_parts_may_be_answered_in_any_order(self) -> None:
        """Rows come back in the order of the request, not of the forwards."""
        port = Port()
        parts = split(large_request(observations(5), port), 2)
        for part in (parts[2], parts[0], parts[1]):
            part.port.deliver([(part, answer_to(part))])
        assert port.answers[0][1]["action"].tolist() == [0, 2, 4, 6, 8]

    def test_several_parts_in_one_delivery(self) -> None:
        """Parts that shared a batch are delivered together."""
        port = Port()
        parts = split(large_request(observations(4), port), 2)
        parts[0].port.deliver([(part, answer_to(part)) for part in parts])
        assert [joined["action"].tolist() for _, joined in port.answers] == [[0, 2, 4, 6]]

    def test_two_wholes_do_not_mix(self) -> None:
        """Each request collects its own parts."""
        ports = [Port(), Port()]
        split_requests = [split(large_request(observations(4), port), 2) for port in ports]
        for pair in zip(*split_requests, strict=True):
            for part in reversed(pair):
                part.port.deliver([(part, answer_to(part))])
        assert all(port.answers[0][1]["action"].tolist() == [0, 2, 4, 6] for port in ports)

    def test_the_first_error_answers_the_whole(self) -> None:
        """One part that fails fails the request, once, whatever the others do."""
        port = Port()
        request = large_request(observations(6), port)
        parts = split(request, 2)
        error = ModelError("no")
        parts[0].port.deliver([(parts[0], answer_to(parts[0]))])
        parts[1].port.deliver([(parts[1], error)])
        parts[2].port.deliver([(parts[2], ModelError("also no"))])
        assert port.answers == [(request, error)]

    def test_answers_for_a_caller_that_left_are_dropped(self) -> None:
        """A whole that was withdrawn is not answered."""
        port = Port()
        request = large_request(observations(4), port)
        parts = split(request, 2)
        request.state = State.DONE
        for part in parts:
            part.port.deliver([(part, answer_to(part))])
        assert port.answers == []

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (torch.zeros(2, 3), torch.zeros(2, 4)),
            (torch.zeros(2, 3), torch.zeros(2, 3, 1)),
        ],
        ids=["shape", "rank"],
    )
    def test_parts_that_cannot_be_joined_fail_the_request_alone(
        self, first: torch.Tensor, second: torch.Tensor
    ) -> None:
        """A policy whose answers differ in shape from batch to batch harms nobody else: the
        port does not raise, and the caller learns why.
        """
        self.check_cannot_be_joined(
            TensorDict({"action": first}, batch_size=[2]),
            TensorDict({"action": second}, batch_size=[2]),
        )

    def test_parts_with_other_names_fail_the_request_alone(self) -> None:
        """The same for answers that name their entries differently."""
        self.check_cannot_be_joined(
            TensorDict({"action": torch.zeros(2)}, batch_size=[2]),
            TensorDict({"act": torch.zeros(2)}, batch_size=[2]),
        )

    def check_cannot_be_joined(self, first: TensorDictBase, second: TensorDictBase) -> None:
        port = Port()
        request = large_request(observations(4), port)
        one, two = split(request, 2)
        one.port.deliver([(one, first)])
        two.port.deliver([(two, second)])
        ((whole, error),) = port.answers
        assert whole is request
        assert isinstance(error, ModelError)
        assert error.__cause__ is not None

    def test_nested_answers_are_joined(self) -> None:
        """Answers that are not plain are joined like any other."""
        port = Port()
        for_join = split(large_request(observations(5), port), 2)
        for part in for_join:
            answer = TensorDict({"out": answer_to(part)}, batch_size=[part.rows])
            part.port.deliver([(part, answer)])
        assert port.answers[0][1]["out", "action"].tolist() == [0, 2, 4, 6, 8]

    def test_non_tensor_answers_are_joined(self) -> None:
        """Strings of all parts come back, in order."""
        port = Port()
        parts = split(large_request(observations(5), port), 2)
        for part in parts:
            rows = [TensorDict({"name": f"n{int(i)}"}) for i in tensordict_of(part)["observation"]]
            part.port.deliver([(part, torch.stack(rows))])
        ((_, joined),) = port.answers
        assert joined.batch_size == torch.Size([5])
        assert joined["name"] == ["n0", "n1", "n2", "n3", "n4"]
