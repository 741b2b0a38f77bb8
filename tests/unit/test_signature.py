"""What makes requests alike, and what is refused at the door."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack, tensorclass
from tensordict.nn import InteractionType

from aioinfer import signature as module
from aioinfer.errors import InvalidRequestError
from aioinfer.signature import Signature, describe


@tensorclass
class Camera:
    """A tensorclass."""

    image: torch.Tensor


@tensorclass
class Lidar:
    """Another one, with the same fields."""

    image: torch.Tensor


def signature_of(td: Any, mode: InteractionType | None = None) -> Signature:
    return describe(td, mode)[3]


def plain(**leaves: torch.Tensor) -> TensorDict:
    return TensorDict(leaves)


OBSERVATION = torch.zeros(3)


class TestAlike:
    """Requests that may share a batch."""

    def test_equal_looks_are_the_same_object(self) -> None:
        """Comparing signatures is comparing identities."""
        assert signature_of(plain(x=OBSERVATION)) is signature_of(plain(x=torch.ones(3)))

    def test_the_order_of_the_leaves_does_not_matter(self) -> None:
        """The same leaves in another order look the same, and the data is put in order."""
        a, _, _, first = describe(plain(x=torch.zeros(1), y=torch.ones(2)), None)
        b, _, _, second = describe(plain(y=torch.ones(2), x=torch.zeros(1)), None)
        assert first is second
        assert (
            [tuple(leaf.shape) for leaf in a] == [tuple(leaf.shape) for leaf in b] == [(1,), (2,)]
        )

    def test_bare_rows_and_k_rows_look_alike(self) -> None:
        """``[]`` and ``[K]`` of the same row may share a batch, whatever K."""
        bare = plain(x=OBSERVATION)
        assert signature_of(bare) is signature_of(bare.expand(5))
        assert signature_of(bare) is signature_of(bare.expand(1))

    def test_nested_ones_too(self) -> None:
        """The same holds for nested requests."""
        nested = TensorDict({"in": plain(x=OBSERVATION), "name": NonTensorData("a")})
        other = TensorDict({"name": NonTensorData("b"), "in": plain(x=torch.ones(3))})
        assert signature_of(nested) is signature_of(other)
        assert signature_of(nested) is signature_of(nested.expand(4))

    def test_lazy_stacks_look_like_lazy_stacks_of_any_size(self) -> None:
        """K rows in a lazy stack, whatever K."""
        one = plain(x=OBSERVATION)
        assert signature_of(lazy_stack([one])) is signature_of(lazy_stack([one, one]))


class TestDifferent:
    """Requests that may not share a batch."""

    @pytest.mark.parametrize(
        "other",
        [
            plain(y=OBSERVATION),
            plain(x=OBSERVATION, y=OBSERVATION),
            plain(x=torch.zeros(4)),
            plain(x=torch.zeros(3, 1)),
            plain(x=torch.zeros(3, dtype=torch.float64)),
            TensorDict({"x": plain(x=OBSERVATION)}),
            TensorDict({"x": OBSERVATION, "name": "a"}),
        ],
        ids=["name", "more", "shape", "rank", "dtype", "nested", "non-tensor"],
    )
    def test_a_difference_in_looks(self, other: TensorDict) -> None:
        """Names, shapes, dtypes and structure tell requests apart."""
        assert signature_of(plain(x=OBSERVATION)) is not signature_of(other)

    def test_the_sampling_mode(self) -> None:
        """Modes do not mix in a forward (pitfall 30)."""
        modes = [None, InteractionType.DETERMINISTIC, InteractionType.RANDOM]
        for td in (plain(x=OBSERVATION), TensorDict({"in": plain(x=OBSERVATION)})):
            assert len({id(signature_of(td, mode)) for mode in modes}) == 3
            assert [signature_of(td, mode).mode for mode in modes] == modes

    def test_non_tensor_leaves_are_seen(self) -> None:
        """An entry that is no tensor is part of the looks, in single rows and in K."""
        without, named = plain(x=OBSERVATION), TensorDict({"x": OBSERVATION, "name": "a"})
        other = TensorDict({"x": OBSERVATION, "title": "a"})
        nested = [TensorDict({"in": td}) for td in (without, named, other)]
        assert len({id(signature_of(td)) for td in nested}) == 3
        assert signature_of(named) is signature_of(torch.stack([named, named.clone()]))
        differing = torch.stack([named, TensorDict({"x": OBSERVATION, "name": "b"})])
        assert signature_of(named) is signature_of(differing)
        assert signature_of(named).keys == ("name", "x")

    def test_different_tensorclasses_never_share_a_batch(self) -> None:
        """Classes with equal fields are different kinds of request."""
        image = torch.zeros(3)
        camera, lidar = Camera(image, batch_size=[]), Lidar(image, batch_size=[])
        assert signature_of(camera) is not signature_of(lidar)
        assert signature_of(camera) is signature_of(Camera(torch.ones(3), batch_size=[]))
        lazy = lazy_stack([plain(image=image)])
        assert signature_of(lazy) is not signature_of(camera)


class TestWhatIsKept:
    """The data, the rows and the batch dimension."""

    def test_plain_requests_keep_a_tuple_of_their_tensors(self) -> None:
        """The tensors themselves, in the order of the keys."""
        td = plain(b=torch.zeros(1), a=torch.ones(2))
        data, rows, batched, signature = describe(td, None)
        assert (rows, batched, signature.plain) == (1, False, True)
        assert signature.keys == ("a", "b")
        assert data[0] is td["a"]
        assert data[1] is td["b"]

    def test_k_rows(self) -> None:
        """``[K]`` is K rows with a batch dimension, ``[1]`` too."""
        assert describe(plain(x=OBSERVATION).expand(5), None)[1:3] == (5, True)
        assert describe(plain(x=OBSERVATION).expand(1), None)[1:3] == (1, True)

    @pytest.mark.parametrize(
        ("td", "rows", "batched"),
        [
            (TensorDict({"in": plain(x=OBSERVATION)}), 1, False),
            (TensorDict({"in": plain(x=OBSERVATION)}).expand(3), 3, True),
            (lazy_stack([plain(x=OBSERVATION)] * 2), 2, True),
            (Camera(torch.zeros(4, 3), batch_size=[4]), 4, True),
        ],
        ids=["nested", "nested rows", "lazy", "tensorclass"],
    )
    def test_others_keep_the_request_as_it_is(self, td: Any, rows: int, batched: bool) -> None:
        """Whatever is not plain goes on as the object that was sent."""
        data, *found, signature = describe(td, None)
        assert data is td
        assert found == [rows, batched]
        assert not signature.plain

    def test_a_request_without_entries_is_a_request(self) -> None:
        """A policy that needs no input may be asked with an empty TensorDict."""
        assert describe(TensorDict({}), None)[:3] == ((), 1, False)
        assert describe(TensorDict({}, batch_size=[2]), None)[1:3] == (2, True)


class TestRefused:
    """Requests that cannot be served; the error says what was given and what is allowed."""

    @pytest.mark.parametrize("wrong", [torch.zeros(3), {"x": OBSERVATION}, None, 3, "td"])
    def test_not_a_tensordict(self, wrong: Any) -> None:
        """Another type is a TypeError that names it."""
        with pytest.raises(TypeError, match="TensorDict or a tensorclass") as caught:
            describe(wrong, None)
        assert type(wrong).__name__ in str(caught.value)

    def test_non_tensor_data_alone(self) -> None:
        """Non-tensor data is not a request by itself."""
        with pytest.raises(TypeError, match="NonTensorData"):
            describe(NonTensorData("a"), None)

    @pytest.mark.parametrize("nested", [False, True])
    def test_more_than_one_batch_dimension(self, nested: bool) -> None:
        """Only ``[]`` and ``[K]`` are rows, and the way out is named."""
        td = plain(x=OBSERVATION)
        td = (TensorDict({"in": td}) if nested else td).expand(2, 5)
        with pytest.raises(InvalidRequestError, match="reshape") as caught:
            describe(td, None)
        assert "[2, 5]" in str(caught.value)

    @pytest.mark.parametrize("nested", [False, True])
    def test_zero_rows(self, nested: bool) -> None:
        """A request for nothing is refused."""
        td = plain(x=OBSERVATION)
        td = (TensorDict({"in": td}) if nested else td).expand(0)
        with pytest.raises(InvalidRequestError, match="at least one row"):
            describe(td, None)

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_device_without_values(self, nested: bool) -> None:
        """Tensors on ``meta`` cannot be computed with; the leaf is named."""
        td = plain(x=torch.zeros(3, device="meta"))
        td = TensorDict({"in": td}) if nested else td
        for _ in range(2):  # refused the second time too, when the looks are known
            with pytest.raises(InvalidRequestError, match="meta") as caught:
                describe(td, None)
            assert "x is on device" in str(caught.value)

    def test_a_lazy_stack_of_unlike_rows(self) -> None:
        """Rows of different shapes cannot share a batch; the way out is named."""
        unlike = lazy_stack([plain(x=torch.zeros(2)), plain(x=torch.zeros(3))])
        with pytest.raises(InvalidRequestError, match="one by one"):
            describe(unlike, None)

    def test_the_errors_are_value_errors_too(self) -> None:
        """Code that knows nothing of this library can catch them."""
        with pytest.raises(ValueError, match="at least one row"):
            describe(plain(x=OBSERVATION).expand(0), None)


class TestDescription:
    """``str(signature)``, as it stands in error messages."""

    def test_names_shapes_and_dtypes(self) -> None:
        """One row's leaves, sorted by name."""
        td = plain(x=torch.zeros(4), flag=torch.tensor(True)).expand(7)
        assert str(signature_of(td)) == "flag: bool[], x: float32[4]"

    def test_nested_and_non_tensor_leaves(self) -> None:
        """Paths are dotted."""
        td = TensorDict({"in": plain(x=torch.zeros(2, dtype=torch.int64)), "name": "a"})
        assert str(signature_of(td)) == "in.x: int64[2], name: non-tensor"

    def test_the_sampling_mode(self) -> None:
        """A mode is part of the looks."""
        described = str(signature_of(plain(x=OBSERVATION), InteractionType.MODE))
        assert described == "x: float32[3], interaction_type=mode"

    def test_no_entries(self) -> None:
        """An empty request says so."""
        assert str(signature_of(TensorDict({}))) == "no entries"

    def test_a_device_other_than_the_cpu(self) -> None:
        """The device is named where it is not the usual one."""
        signature = copy.copy(signature_of(plain(x=torch.zeros(2))))
        signature.leaves = ((torch.Size([2]), torch.float32, torch.device("cuda", 1)),)
        assert str(signature) == "x: float32[2] on cuda:1"


class TestMemory:
    """Looks that keep changing must not fill memory."""

    def test_what_is_remembered_is_bounded(self) -> None:
        """There is an upper bound on the signatures that are kept."""
        for cache in (module._plain_signature, module._intern):
            assert cache.cache_info().maxsize == module._REMEMBERED < 100_000

    def test_many_different_looks(self) -> None:
        """More kinds of request than are remembered: all are described right."""
        for i in range(module._REMEMBERED + 100):
            name = f"x{i}"
            signature = signature_of(TensorDict({name: OBSERVATION}))
            assert signature.keys == (name,)
        assert module._intern.cache_info().currsize <= module._REMEMBERED
