"""Requests to one batch, and the policy's answer back to one result per request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, lazy_stack, tensorclass
from torch.overrides import TorchFunctionMode

from aioinfer import collation
from aioinfer.collation import Collator, tensordict_of
from aioinfer.errors import ModelError
from aioinfer.replies import Columns
from aioinfer.request import Request, Source
from aioinfer.signature import describe


@tensorclass
class Observation:
    """A request that is a tensorclass."""

    image: torch.Tensor
    speed: torch.Tensor


@pytest.fixture(params=["_new_unsafe", "the constructor"], autouse=True)
def _both_ways_to_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds too where TensorDict has no ``_new_unsafe``."""
    if request.param == "the constructor":
        monkeypatch.setattr(collation, "new_tensordict", TensorDict)


def collator(**options: Any) -> Collator:
    defaults: dict[str, Any] = {
        "collate_fn": None,
        "device": None,
        "output_device": None,
        "out_keys": None,
        "version_key": None,
        "return_inputs": False,
    }
    return Collator(**{**defaults, **options})


def request_for(td: Any) -> Request:
    data, rows, batched, signature = describe(td, None)
    return Request(data, rows, batched, signature, None, 0, Source(), None)


def requests_for(*tds: Any) -> tuple[list[Request], int]:
    requests = [request_for(td) for td in tds]
    return requests, sum(request.rows for request in requests)


def collate(*tds: Any, size: int | None = None, **options: Any) -> TensorDictBase:
    requests, count = requests_for(*tds)
    return collator(**options).collate(requests, count, count if size is None else size)


class Counted(TorchFunctionMode):
    """Counts the calls of torch's functions."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name != "__get__":  # an attribute
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [2, 50])
def test_one_operation_per_leaf(count: int) -> None:
    """Gathering and scattering cost the same calls of torch, however many requests there are."""
    requests, rows = requests_for(*(row(i, speed=torch.tensor(i)) for i in range(count)))
    made = collator()
    answer = TensorDict({"action": torch.zeros(count, 2), "value": torch.zeros(count)}, [count])
    with Counted() as gathering:
        made.collate(requests, rows, rows)
    with Counted() as scattering:
        answers = made.split(answer, requests, rows, rows, 0)
        assert isinstance(answers, Columns)
        answers.results()
    assert gathering.calls.count("stack") == len(gathering.calls) == 2
    heavy = [call for call in scattering.calls if call in ("clone", "unbind")]
    assert sorted(heavy) == ["clone", "clone", "unbind", "unbind"]
    assert len(scattering.calls) < 20


def row(value: float, **more: Any) -> TensorDict:
    return TensorDict({"observation": torch.full((3,), value), **more})


def rows(*values: float) -> TensorDict:
    return torch.stack([row(value) for value in values])


def observed(batch: TensorDictBase) -> list[float]:
    """The first number of each row's observation."""
    return batch["observation"][..., 0].tolist()


class TestCollating:
    """Requests to a batch."""

    def test_bare_rows_are_stacked_in_order(self) -> None:
        """N requests of batch size ``[]`` make one batch of ``[N]``."""
        batch = collate(row(1), row(2), row(3))
        assert batch.batch_size == torch.Size([3])
        assert batch["observation"].shape == (3, 3)
        assert observed(batch) == [1, 2, 3]

    def test_one_row_makes_a_batch_of_one(self) -> None:
        """A single request gains a batch dimension."""
        assert collate(row(1)).batch_size == torch.Size([1])

    def test_k_rows_are_concatenated_with_bare_ones(self) -> None:
        """Requests of ``[K]`` and ``[]`` share a batch, their rows in order (pitfall 9)."""
        batch = collate(row(1), rows(2, 3), row(4), rows(5))
        assert batch.batch_size == torch.Size([5])
        assert observed(batch) == [1, 2, 3, 4, 5]

    def test_the_order_of_the_leaves_does_not_matter(self) -> None:
        """Requests that name the same leaves in another order are not mixed up."""
        a = TensorDict({"x": torch.tensor([1.0]), "y": torch.tensor([2.0])})
        b = TensorDict({"y": torch.tensor([4.0]), "x": torch.tensor([3.0])})
        batch = collate(a, b)
        assert batch["x"].flatten().tolist() == [1, 3]
        assert batch["y"].flatten().tolist() == [2, 4]

    def test_every_dtype_and_rank_survives(self) -> None:
        """Scalars, booleans, bytes and images arrive as they were."""
        td = TensorDict(
            {
                "flag": torch.tensor(True),
                "image": torch.zeros(2, 4, 4, dtype=torch.uint8),
                "count": torch.tensor([7], dtype=torch.int32),
            }
        )
        batch = collate(td, td)
        assert {key: (leaf.dtype, tuple(leaf.shape)) for key, leaf in batch.items()} == {
            "flag": (torch.bool, (2,)),
            "image": (torch.uint8, (2, 2, 4, 4)),
            "count": (torch.int32, (2, 1)),
        }

    def test_the_batch_is_a_copy(self) -> None:
        """What the policy does to its batch does not reach the caller's tensors."""
        td = row(1)
        collate(td)["observation"].zero_()
        many = rows(1, 2)
        collate(many)["observation"].zero_()
        assert td["observation"].tolist() == [1, 1, 1]
        assert observed(many) == [1, 2]

    def test_nested_requests(self) -> None:
        """Nested TensorDicts are stacked level by level."""
        batch = collate(*(TensorDict({"in": row(i)}) for i in (1, 2)))
        assert batch.batch_size == torch.Size([2])
        assert observed(batch["in"]) == [1, 2]

    def test_nested_rows_are_concatenated_with_bare_ones(self) -> None:
        """``[K]`` and ``[]`` mix for nested requests as well."""
        several = TensorDict({"in": rows(1, 2)}, batch_size=[2])
        batch = collate(several, TensorDict({"in": row(3)}))
        assert observed(batch["in"]) == [1, 2, 3]

    def test_non_tensor_data(self) -> None:
        """Strings and other objects stay with their rows."""
        batch = collate(row(1, name="a"), row(2, name="b"))
        assert batch["name"] == ["a", "b"]

    def test_tensorclasses_stay_tensorclasses(self) -> None:
        """A policy that takes a tensorclass gets one."""
        one = Observation(image=torch.ones(2), speed=torch.ones(()), batch_size=[])
        batch = collate(one, one)
        assert isinstance(batch, Observation)
        assert batch.image.shape == (2, 2)

    def test_lazy_stacks(self) -> None:
        """A lazy stack of K rows is K rows."""
        batch = collate(lazy_stack([row(1), row(2)]), row(3))
        assert observed(batch) == [1, 2, 3]

    def test_the_batch_is_moved_to_the_device(self) -> None:
        """``device`` is where the policy finds its batch."""
        batch = collate(row(1), row(2), device=torch.device("meta"))
        assert batch["observation"].device.type == "meta"


class TestCollateFn:
    """A ``collate_fn`` of the user's."""

    def test_gets_single_rows_as_they_were_sent(self) -> None:
        """Requests of K rows are K entries of its list."""
        seen: list[TensorDictBase] = []

        def collate_fn(tds: list[TensorDictBase]) -> TensorDictBase:
            seen.extend(tds)
            return torch.stack(tds)

        batch = collate(row(1), rows(2, 3), collate_fn=collate_fn)
        assert [td.batch_size for td in seen] == [torch.Size([])] * 3
        assert [observed(td) for td in seen] == [1, 2, 3]
        assert batch.batch_size == torch.Size([3])

    @pytest.mark.parametrize(("made", "says"), [(2, "[2]"), (4, "[4]")])
    def test_a_wrong_number_of_rows_is_refused(self, made: int, says: str) -> None:
        """A batch that lost or gained rows would mix up the answers (pitfall 20)."""
        with pytest.raises(ModelError, match="collate_fn returned batch_size") as caught:
            collate(row(1), row(2), row(3), collate_fn=lambda tds: rows(*range(made)))
        assert says in str(caught.value)
        assert "3 rows" in str(caught.value)

    def test_a_wrong_type_is_refused(self) -> None:
        """A ``collate_fn`` has to make a TensorDict; the error names what it made."""
        with pytest.raises(ModelError, match="collate_fn returned list"):
            collate(row(1), row(2), collate_fn=lambda tds: [1, 2])


def split_answer(
    answer: Any,
    requests: list[Request],
    count: int,
    *,
    size: int | None = None,
    version: int = 0,
    **options: Any,
) -> list[TensorDictBase]:
    size = count if size is None else size
    answers = collator(**options).split(answer, requests, count, size, version)
    return answers.results() if isinstance(answers, Columns) else answers


def actions(*values: float, **more: Any) -> TensorDict:
    return TensorDict(
        {"action": torch.tensor(values).unsqueeze(-1), **more}, batch_size=[len(values)]
    )


class TestSplitting:
    """The answer to results."""

    def test_everybody_gets_their_own_rows(self) -> None:
        """Rows are cut in the order of the requests."""
        results = split_answer(actions(1, 2, 3), *requests_for(row(0), row(0), row(0)))
        assert [result["action"].item() for result in results] == [1, 2, 3]

    def test_results_have_the_batch_size_of_their_requests(self) -> None:
        """A bare row gets a bare row, K rows get K, and ``[1]`` is not ``[]``."""
        results = split_answer(
            actions(1, 2, 3, 4), *requests_for(row(0), rows(0, 0), rows(0)), version_key="v"
        )
        assert [tuple(result.batch_size) for result in results] == [(), (2,), (1,)]
        assert [tuple(result["v"].shape) for result in results] == [(), (2,), (1,)]
        assert [result["action"].flatten().tolist() for result in results] == [[1], [2, 3], [4]]

    def test_results_are_proper_tensordicts(self) -> None:
        """They can be indexed, stacked, changed and compared like any other."""
        results = split_answer(
            actions(1, 2), *requests_for(row(0), row(0)), version_key="policy_version"
        )
        stacked = torch.stack(results)
        assert stacked.batch_size == torch.Size([2])
        results[0].set("more", torch.zeros(1))
        assert set(results[0].keys()) == {"action", "policy_version", "more"}
        assert results[0].to_dict()["action"].item() == 1

    def test_only_the_out_keys_come_back(self) -> None:
        """The observation is not echoed (pitfall 31)."""
        answer = actions(1, 2, observation=torch.zeros(2, 3), hidden=torch.zeros(2, 3))
        results = split_answer(answer, *requests_for(row(0), row(0)), out_keys=["action"])
        assert [set(result.keys()) for result in results] == [{"action"}] * 2

    def test_without_out_keys_all_comes_back(self) -> None:
        """The reply of a plain callable is what it returned."""
        answer = actions(1, hidden=torch.zeros(1, 3))
        (result,) = split_answer(answer, *requests_for(row(0)))
        assert set(result.keys()) == {"action", "hidden"}

    def test_the_out_key_underscore_stands_for_nothing(self) -> None:
        """``"_"`` is TensorDictModule's way to drop an output."""
        (result,) = split_answer(actions(1), *requests_for(row(0)), out_keys=["action", "_"])
        assert set(result.keys()) == {"action"}

    @pytest.mark.parametrize("out_keys", [["action", "value"], [("out", "value"), "action"]])
    def test_a_missing_out_key_is_an_error_that_names_it(self, out_keys: list[Any]) -> None:
        """A policy that did not write what it promised is told so."""
        with pytest.raises(ModelError, match="did not write") as caught:
            split_answer(actions(1), *requests_for(row(0)), out_keys=out_keys)
        assert "value" in str(caught.value)

    @pytest.mark.parametrize("made", [1, 3])
    def test_too_few_or_too_many_rows_are_an_error(self, made: int) -> None:
        """Nobody gets somebody else's answer, and nobody is forgotten (pitfall 20)."""
        with pytest.raises(ModelError, match=rf"\[{made}\] for a batch of 2 rows"):
            split_answer(actions(*range(made)), *requests_for(row(0), row(0)))

    def test_an_answer_without_batch_dimension_is_an_error(self) -> None:
        """A policy that dropped the batch dimension is told so."""
        with pytest.raises(ModelError, match=r"batch_size \[\] for a batch of 1 rows"):
            split_answer(row(1), *requests_for(row(0)))

    @pytest.mark.parametrize("answer", [None, torch.zeros(2, 1), {"action": torch.zeros(2)}])
    def test_a_wrong_type_is_an_error_that_names_it(self, answer: Any) -> None:
        """Only TensorDicts and tensorclasses can be taken apart."""
        with pytest.raises(ModelError, match=type(answer).__name__):
            split_answer(answer, *requests_for(row(0), row(0)))

    def test_a_second_batch_dimension_stays_in_the_rows(self) -> None:
        """An answer of batch size ``[B, T]`` is B rows."""
        answer = TensorDict({"action": torch.arange(6).view(2, 3)}, batch_size=[2, 3])
        results = split_answer(answer, *requests_for(row(0), row(0)))
        assert [result["action"].tolist() for result in results] == [[0, 1, 2], [3, 4, 5]]

    def test_nested_answers(self) -> None:
        """Nested results are cut like flat ones, with and without nested out_keys."""
        answer = TensorDict({"out": actions(1, 2), "rest": torch.zeros(2)}, batch_size=[2])
        requests, count = requests_for(row(0), rows(0))
        results = split_answer(answer, requests, count, out_keys=[("out", "action")])
        assert [r["out", "action"].flatten().tolist() for r in results] == [[1], [2]]
        assert all("rest" not in result for result in results)
        results = split_answer(answer, requests, count, out_keys=["out"])
        assert [r["out", "action"].flatten().tolist() for r in results] == [[1], [2]]
        results = split_answer(answer, requests, count)
        assert all("rest" in result for result in results)

    def test_non_tensor_answers(self) -> None:
        """Strings in the answer go to their rows."""
        answer = torch.stack([row(i, name=NonTensorData(f"n{i}")) for i in (1, 2, 3)])
        results = split_answer(answer, *requests_for(row(0), rows(0, 0)))
        assert results[0]["name"] == "n1"
        assert results[1]["name"] == ["n2", "n3"]

    def test_tensorclass_answers(self) -> None:
        """A policy may answer with a tensorclass."""
        answer = Observation(image=torch.eye(2), speed=torch.arange(2), batch_size=[2])
        results = split_answer(answer, *requests_for(row(0), rows(0)))
        assert all(isinstance(result, Observation) for result in results)
        assert [result.speed.tolist() for result in results] == [0, [1]]

    def test_lazily_stacked_answers(self) -> None:
        """A policy may answer with a lazy stack."""
        answer = lazy_stack([row(1), row(2)])
        results = split_answer(answer, *requests_for(row(0), row(0)))
        assert [observed(result) for result in results] == [1, 2]

    def test_the_answer_itself_is_left_alone(self) -> None:
        """Neither the version nor the selection is written into the policy's own TensorDict."""
        nested = TensorDict({"out": actions(1)}, batch_size=[1])
        for answer in (actions(1, hidden=torch.zeros(1)), nested):
            before = set(answer.keys(include_nested=True))
            split_answer(answer, *requests_for(row(0)), version_key="v")
            assert set(answer.keys(include_nested=True)) == before

    def test_results_are_moved_to_the_output_device(self) -> None:
        """``output_device`` is where callers find their results."""
        for answer in (actions(1), TensorDict({"out": actions(1)}, batch_size=[1])):
            (result,) = split_answer(
                answer, *requests_for(row(0)), output_device=torch.device("meta")
            )
            assert {leaf.device.type for leaf in result.values(True, True)} == {"meta"}


class TestPadding:
    """Batches of a size that a graph or a compiled policy takes."""

    @pytest.mark.parametrize("kind", ["plain", "k rows", "nested", "collate_fn"])
    def test_the_last_row_is_repeated(self, kind: str) -> None:
        """Padding holds valid values: no zeros that a policy might choke on."""
        tds: list[Any] = [row(1), row(2), row(3)]
        options: dict[str, Any] = {}
        if kind == "k rows":
            tds = [row(1), rows(2, 3)]
        elif kind == "nested":
            tds = [TensorDict({"in": td}) for td in tds]
        elif kind == "collate_fn":
            options["collate_fn"] = torch.stack
        batch = collate(*tds, size=5, **options)
        assert batch.batch_size == torch.Size([5])
        assert observed(batch["in"] if kind == "nested" else batch) == [1, 2, 3, 3, 3]

    def test_a_padded_batch_is_a_copy(self) -> None:
        """Padding shares no memory with the request it repeats."""
        td = rows(1, 2)
        batch = collate(td, size=4)
        batch["observation"][2:].zero_()
        assert observed(batch) == [1, 2, 0, 0]
        assert observed(td) == [1, 2]

    @pytest.mark.parametrize("nested", [False, True])
    def test_answers_to_padding_are_dropped(self, nested: bool) -> None:
        """Everybody gets their own rows, and nobody those of the padding."""
        answer = actions(1, 2, 3, 9)
        if nested:
            answer = TensorDict({"out": answer}, batch_size=[4])
        results = split_answer(
            answer, *requests_for(row(0), rows(0, 0)), size=4, version_key="v", version=2
        )
        action = ("out", "action") if nested else "action"
        assert [result[action].flatten().tolist() for result in results] == [[1], [2, 3]]
        assert [result["v"].tolist() for result in results] == [2, [2, 2]]

    def test_bare_rows_with_padding(self) -> None:
        """The same for single rows only."""
        results = split_answer(actions(1, 2, 9, 9), *requests_for(row(0), row(0)), size=4)
        assert [result["action"].tolist() for result in results] == [[1], [2]]

    def test_an_answer_without_the_padding_is_an_error(self) -> None:
        """A policy has to answer as many rows as it was given."""
        with pytest.raises(ModelError, match=r"\[2\] for a batch of 4 rows"):
            split_answer(actions(1, 2), *requests_for(row(0), row(0)), size=4)


class TestVersion:
    """The policy version in the reply."""

    def test_is_an_int64_of_the_requests_batch_size(self) -> None:
        """Every reply says which weights computed it."""
        one, two = split_answer(
            actions(1, 2, 3),
            *requests_for(row(0), rows(0, 0)),
            version=7,
            version_key="policy_version",
        )
        assert one["policy_version"].dtype == torch.int64
        assert one["policy_version"].item() == 7
        assert two["policy_version"].tolist() == [7, 7]

    def test_none_leaves_it_out(self) -> None:
        """``version_key=None`` turns the stamp off."""
        (result,) = split_answer(actions(1), *requests_for(row(0)), version=7)
        assert set(result.keys()) == {"action"}

    def test_the_key_may_be_nested(self) -> None:
        """A tuple is a path."""
        (result,) = split_answer(
            actions(1), *requests_for(row(0)), version=7, version_key=("meta", "version")
        )
        assert result["meta", "version"].item() == 7

    def test_is_there_for_nested_answers(self) -> None:
        """The slower path stamps too."""
        answer = TensorDict({"out": actions(1, 2)}, batch_size=[2])
        results = split_answer(answer, *requests_for(row(0), rows(0)), version=7, version_key="v")
        assert [result["v"].tolist() for result in results] == [7, [7]]


class TestReturnInputs:
    """``return_inputs=True``."""

    def test_the_request_comes_back_with_the_answer(self) -> None:
        """The reply holds the request's own entries and the answer's."""
        results = split_answer(
            actions(1, 2), *requests_for(row(5), rows(6)), return_inputs=True, version_key="v"
        )
        assert [set(result.keys()) for result in results] == [{"observation", "action", "v"}] * 2
        assert observed(results[0]) == 5
        assert results[1].batch_size == torch.Size([1])

    def test_the_answer_wins(self) -> None:
        """Where the policy rewrites an input, the reply holds what it wrote."""
        answer = rows(9)
        (result,) = split_answer(answer, *requests_for(row(5)), return_inputs=True)
        assert observed(result) == 9

    def test_the_callers_tensordict_is_left_alone(self) -> None:
        """The answer is not written into what the caller sent."""
        for td in (row(5), TensorDict({"in": row(5)})):
            split_answer(actions(1), *requests_for(td), return_inputs=True)
            assert "action" not in td


class TestNobodySharesMemory:
    """What one caller does to its reply reaches nobody else."""

    def test_expanded_rows_are_told_apart(self) -> None:
        """A policy that answers all rows with one expanded value."""
        answer = TensorDict({"action": torch.zeros(1, 2).expand(3, 2)}, batch_size=[3])
        results = split_answer(answer, *requests_for(row(0), row(0), row(0)))
        results[0]["action"].add_(1)
        assert results[1]["action"].tolist() == [0, 0]

    def test_expanded_rows_are_told_apart_in_nested_answers(self) -> None:
        """The slower path too."""
        inner = TensorDict({"action": torch.zeros(1, 2).expand(2, 2)}, batch_size=[2])
        answer = TensorDict({"out": inner}, batch_size=[2])
        results = split_answer(answer, *requests_for(row(0), row(0)))
        results[0]["out", "action"].add_(1)
        assert results[1]["out", "action"].tolist() == [0, 0]

    def test_expanded_rows_are_told_apart_within_k_rows(self) -> None:
        """Rows of one reply do not share memory either."""
        answer = TensorDict({"action": torch.zeros(()).expand(2)}, batch_size=[2])
        (result,) = split_answer(answer, *requests_for(rows(0, 0)))
        result["action"][0] = 1
        assert result["action"].tolist() == [1, 0]

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_reply_never_shares_memory_with_the_policys_parameters(self, count: int) -> None:
        """A caller that writes into its reply does not change the policy."""
        weight = torch.nn.Parameter(torch.zeros(2))
        with torch.no_grad():
            answer = TensorDict({"action": weight.expand(count, 2)}, batch_size=[count])
            results = split_answer(answer, *requests_for(*[row(0)] * count))
            results[0]["action"].add_(1)
        assert weight.tolist() == [0, 0]


def test_a_request_can_be_turned_back_into_what_was_sent() -> None:
    """``tensordict_of`` gives the rows of plain and of other requests as they came."""
    for td in (row(1), rows(1, 2), TensorDict({"in": row(1)})):
        again = tensordict_of(request_for(td))
        assert again.batch_size == td.batch_size
        assert (again == td).all()
