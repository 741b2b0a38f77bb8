"""Random numbers per row: what they depend on, and how they are distributed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import distributions

from aioinfer.errors import InvalidRequestError
from aioinfer.seeding import KEY, RowRandom, Seeded, Stream, _mix, _mix_all, _signed

MANY = 40_000


def streams(count: int) -> torch.Tensor:
    rows = TensorDict({"x": torch.zeros(count)}, [count])
    return Stream(0).attach(rows)[KEY]


DRAWS: dict[str, Callable[[int], torch.Tensor]] = {
    "rand": lambda n: torch.rand(n, 2),
    "rand_like": lambda n: torch.rand_like(torch.zeros(n)),
    "randn": lambda n: torch.randn(n, 3),
    "randn_like": lambda n: torch.randn_like(torch.zeros(n, dtype=torch.float64)),
    "randint": lambda n: torch.randint(3, 7, (n,)),
    "normal, two tensors": lambda n: torch.normal(torch.zeros(n), torch.ones(n)),
    "normal, mean": lambda n: torch.normal(torch.zeros(n), 2.0),
    "normal, std": lambda n: torch.normal(1.0, torch.ones(n)),
    "normal, numbers": lambda n: torch.normal(0.0, 1.0, (n, 2)),
    "normal_": lambda n: torch.empty(n).normal_(1, 2),
    "uniform_": lambda n: torch.empty(n).uniform_(-1, 1),
    "exponential_": lambda n: torch.empty(n).exponential_(2.0),
    "bernoulli": lambda n: torch.bernoulli(torch.full((n,), 0.3)),
    "bernoulli_": lambda n: torch.empty(n).bernoulli_(0.3),
    "multinomial": lambda n: torch.multinomial(torch.tensor([0.1, 0.2, 0.7]).expand(n, 3), 2),
    "dropout": lambda n: torch.nn.functional.dropout(torch.ones(n), 0.3),
    "Categorical": lambda n: _categorical(n).sample(),
    "several Categoricals": lambda n: _categorical(n, 2).sample(),
    "Normal": lambda n: distributions.Normal(torch.zeros(n, 2), torch.ones(n, 2)).rsample(),
    "Bernoulli": lambda n: distributions.Bernoulli(probs=torch.full((n,), 0.4)).sample(),
    "Gumbel": lambda n: distributions.Gumbel(torch.zeros(n), torch.ones(n)).sample(),
}


def _of_neighbours(drawn: torch.Tensor) -> float:
    """The correlation of what is drawn one after the other."""
    flat = drawn.flatten()
    return torch.corrcoef(torch.stack([flat[1:], flat[:-1]]))[0, 1].item()


def _categorical(*shape: int) -> distributions.Categorical:
    return distributions.Categorical(probs=torch.tensor([0.1, 0.2, 0.7]).expand(*shape, 3))


@pytest.mark.parametrize("name", DRAWS)
class TestDraws:
    """Each of torch's operations, on its own."""

    def test_depends_on_the_rows_stream_alone(self, name: str) -> None:
        """A row draws the same at any place, in any company, whatever torch's own seed."""
        draw = DRAWS[name]
        many = streams(32)
        with RowRandom(many):
            before = draw(32)
        torch.manual_seed(123)
        order = torch.randperm(32)
        with RowRandom(many[order]):
            after = draw(32)
        assert torch.equal(after, before[order])

    def test_is_distributed_as_torchs_own(self, name: str) -> None:
        """Dtype and shape are those of torch; mean and spread too, and how rows are alike."""
        draw = DRAWS[name]
        torch.manual_seed(0)
        theirs = draw(MANY)
        with RowRandom(streams(MANY)):
            ours = draw(MANY)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        ours, theirs = ours.double(), theirs.double()
        spread = theirs.std().item()
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.03 * spread)
        assert ours.std().item() == pytest.approx(spread, rel=0.03)
        for end in theirs.flatten()[:20]:
            below = (ours <= end).double().mean().item()
            assert below == pytest.approx((theirs <= end).double().mean().item(), abs=0.02)
        assert _of_neighbours(ours) == pytest.approx(_of_neighbours(theirs), abs=0.03)

    def test_the_next_draw_is_another(self, name: str) -> None:
        """Within a forward, each draw is fresh."""
        draw = DRAWS[name]
        with RowRandom(streams(64)):
            assert not torch.equal(draw(64), draw(64))


def test_uniform_numbers_are_below_one():
    """Whatever the precision, ``rand`` does not return 1 (of which no logarithm may be taken)."""
    with RowRandom(streams(MANY)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            drawn = torch.rand(MANY, dtype=dtype)
            assert drawn.dtype == dtype
            assert drawn.min() >= 0
            assert drawn.max() < 1


def test_numbers_and_tensors_are_mixed_alike():
    """What the client computes with numbers is what tensors give, for large and small ones."""
    numbers = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 12345678901234567890]
    tensors = torch.tensor([_signed(number) for number in numbers])
    assert _mix_all(tensors).tolist() == [_signed(_mix(number)) for number in numbers]


def test_what_has_no_form_per_row_is_refused():
    """A policy that draws with an operation of another kind fails, and is told which ones work."""
    with (
        RowRandom(streams(8)),
        pytest.raises(NotImplementedError, match="_sample_dirichlet.*normal_"),
    ):
        distributions.Beta(torch.ones(8), torch.ones(8)).sample()


def test_noise_that_is_not_per_row_is_refused():
    """Noise whose first dimension is not that of the rows would be shared by them."""
    with RowRandom(streams(8)), pytest.raises(NotImplementedError, match=r"\[3, 8\].*8 rows"):
        torch.randn(3, 8)


class TestStream:
    """What a client sends."""

    def test_every_step_and_row_has_its_own(self) -> None:
        """No two of 10,000 rows, of bare and of several rows, of three seeds, are alike."""
        seen = []
        for seed in (0, 1, (0, 1)):
            stream = Stream(seed)
            seen += [stream.attach(TensorDict()).get(KEY).item() for _ in range(1000)]
            for _ in range(23):
                seen += stream.attach(TensorDict(batch_size=[100])).get(KEY).tolist()
        assert len(set(seen)) == len(seen)

    def test_the_same_seed_gives_the_same(self) -> None:
        """Streams depend on seed and step alone; a list and a tuple are the same seed."""
        one, other = Stream((1, -2)), Stream([1, -2])
        for _ in range(3):
            assert one.attach(TensorDict())[KEY] == other.attach(TensorDict())[KEY]
        assert Stream((1, -2)).attach(TensorDict())[KEY] != one.attach(TensorDict())[KEY]

    def test_goes_on_where_it_was_after_pickling(self) -> None:
        """A stream that is sent to another process does not start again."""
        stream = Stream(5)
        stream.attach(TensorDict())
        copy = pickle.loads(pickle.dumps(stream))
        assert copy.attach(TensorDict())[KEY] == stream.attach(TensorDict())[KEY]

    def test_leaves_the_callers_request_alone(self) -> None:
        """The entry is added to a copy."""
        td = TensorDict({"x": torch.zeros(2)})
        assert set(Stream(0).attach(td).keys()) == {"x", KEY}
        assert set(td.keys()) == {"x"}

    @pytest.mark.parametrize("seed", ["7", 7.0, True, (), (1, "2")])
    def test_other_seeds_are_refused(self, seed: Any) -> None:
        """A seed is an int or several."""
        with pytest.raises(TypeError, match="seed must be an int, several, or None"):
            Stream(seed)

    def test_other_requests_are_refused(self) -> None:
        """What cannot hold one more entry cannot have a stream."""
        with pytest.raises(InvalidRequestError, match="sends TensorDicts, got int"):
            Stream(0).attach(3)


def test_a_policy_does_not_see_the_streams():
    """The entry is for the server; the policy gets its batch as it is without a seed."""
    seen = []

    def policy(td: TensorDictBase) -> TensorDictBase:
        seen.append(set(td.keys()))
        return td

    call = Seeded(policy, policy)
    batch = TensorDict({"x": torch.zeros(4)}, [4])
    call(batch)
    call(Stream(0).attach(batch))
    assert seen == [{"x"}, {"x"}]
