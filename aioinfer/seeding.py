"""Random numbers of a row's own, so that what a policy samples does not depend on the batch.

Torch's generators are sequences: what a row gets depends on how much was drawn before it, and so
on which rows share its batch. Here noise is a function of counters instead (as in Philox, by
Salmon et al. 2011): of the row's stream, which its client made of (seed, step, row); of how many
draws this forward has made before; and of the place within the row. A client that was given a
seed sends the stream as one more entry of its request, so it takes every link. While such rows are
in the policy, torch's own random operations draw from their streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch.utils._python_dispatch import TorchDispatchMode

from aioinfer.errors import InvalidRequestError

KEY = "random_stream"
"""The entry of a request that holds the streams of its rows: int64, one number per row."""

# -- the counters -------------------------------------------------------------

# The finaliser and the increment of SplitMix64 (Steele, Lea and Flood 2014).
_A, _B, _STEP = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(number: int) -> int:
    """Scramble 64 bits."""
    number &= _MASK
    number = (number ^ number >> 30) * _A & _MASK
    number = (number ^ number >> 27) * _B & _MASK
    return number ^ number >> 31


def _signed(number: int) -> int:
    """The same bits, as torch's int64."""
    return number - (1 << 64) if number >> 63 else number


def _mix_all(numbers: torch.Tensor) -> torch.Tensor:
    """Do as :func:`_mix` does, to int64, whose products wrap and whose shifts keep the sign."""
    numbers = (numbers ^ (numbers >> 30 & (1 << 34) - 1)) * _signed(_A)
    numbers = (numbers ^ (numbers >> 27 & (1 << 37) - 1)) * _signed(_B)
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)


class Stream:
    """The client's end: one stream per row and step.

    Args:
        seed: an int, or several, such as (run, actor).
    """

    def __init__(self, seed: int | Sequence[int]) -> None:
        parts: Sequence[Any] = seed if isinstance(seed, tuple | list) else [seed]
        if not parts or any(isinstance(p, bool) or not isinstance(p, int) for p in parts):
            raise TypeError(f"seed must be an int, several, or None, got {seed!r}")
        self._key = 0
        for part in parts:
            self._key = _mix(self._key + _STEP ^ _mix(part))
        self._steps = 0

    def attach(self, td: Any) -> TensorDictBase:
        """Return a shallow copy of a request with the streams of the next step."""
        if not isinstance(td, TensorDictBase):
            raise InvalidRequestError(
                f"a client with a seed sends TensorDicts, got {type(td).__name__}"
            )
        self._steps += 1
        step = _mix(self._key + self._steps * _STEP)
        streams = torch.tensor(_signed(step))
        for rows in td.batch_size:
            streams = _mix_all(streams + torch.arange(rows) * _signed(_STEP))
        return td.copy().set(KEY, streams)


# -- the policy's end ---------------------------------------------------------


class Seeded:
    """Calls a policy with the streams of a batch, where its requests have some.

    Args:
        call: the policy, for batches without.
        eager: the policy, uncompiled, for batches with streams.
    """

    def __init__(self, call: Callable[[Any], Any], eager: Callable[[Any], Any]) -> None:
        self._call = call
        self._eager = eager

    def __call__(self, batch: TensorDictBase) -> Any:
        """Run the policy."""
        # The dictionary itself, where it is one: asking the TensorDict takes a microsecond.
        entries = getattr(batch, "_tensordict", None)
        if KEY not in (_keys(batch) if entries is None else entries):
            return self._call(batch)
        with RowRandom(batch.get(KEY)):
            return self._eager(batch.exclude(KEY))


def _keys(batch: Any) -> Any:
    return batch.keys() if isinstance(batch, TensorDictBase) else ()


class RowRandom(TorchDispatchMode):
    """In its ``with`` block, random operations draw from the streams of the rows.

    What they fill must have the rows as its first dimension. An operation that has no form per
    row raises :class:`NotImplementedError`, so nothing is ever drawn from elsewhere unnoticed.

    Args:
        streams: int64, one per row.
    """

    def __init__(self, streams: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams = streams
        self._draws = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        draw = _DRAWS.get(name)
        if draw is None:
            raise NotImplementedError(
                f"the policy draws with torch's {name}, which cannot be drawn row by row; for "
                f"requests of a client with a seed there are {', '.join(sorted(_DRAWS))}"
            )
        bound = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        names = [argument.name for argument in func._schema.arguments]
        return draw(self, bound | dict(zip(names, args, strict=False)) | kwargs)

    def uniform(self, like: torch.Tensor) -> torch.Tensor:
        """Return float64 (float32 where there is none) between 0 and 1, both excluded."""
        rows = self._streams.shape[0]
        if not like.ndim or like.shape[0] % rows:
            raise NotImplementedError(
                f"the policy draws random numbers of shape {list(like.shape)} for a batch of "
                f"{rows} rows; for requests of a client with a seed, the first dimension must be "
                "that of the rows"
            )
        self._draws += 1
        first = _signed(_mix(self._draws * _STEP))
        per_row = like.numel() // rows
        places = torch.arange(per_row, device=like.device) * _signed(_STEP)
        streams = self._streams.to(like.device)
        bits = _mix_all(_mix_all(streams + first).unsqueeze(1) + places)
        exact, dtype = (24, torch.float32) if like.device.type == "mps" else (52, torch.float64)
        whole = (bits >> 64 - exact & (1 << exact) - 1).to(dtype)
        return ((whole + 0.5) / (1 << exact)).view(like.shape)

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Return standard normal numbers."""
        return torch.erfinv(self.uniform(like) * 2 - 1) * 2**0.5

    def exponential(self, like: torch.Tensor) -> torch.Tensor:
        """Return exponential numbers of mean 1."""
        return -torch.log(self.uniform(like))


# -- torch's operations, by the names of their arguments ----------------------

_Bound = dict[str, Any]


def _new(bound: _Bound) -> torch.Tensor:
    """What a factory such as ``rand`` or ``rand_like`` is to fill."""
    like, dtype, device = bound.get("self"), bound.get("dtype"), bound.get("device")
    if like is not None:
        return torch.empty_like(like, dtype=dtype, device=device)
    return torch.empty(bound["size"], dtype=dtype, device=device)


def _rand(random: RowRandom, bound: _Bound) -> Any:
    like = _new(bound)
    return _within(random.uniform(like), like.dtype)


def _randn(random: RowRandom, bound: _Bound) -> Any:
    like = _new(bound)
    return random.normal(like).to(like.dtype)


def _randint(random: RowRandom, bound: _Bound) -> Any:
    dtype = bound["dtype"]  # by default a number, which stands for int64
    like = _new(bound | {"dtype": dtype if isinstance(dtype, torch.dtype) else torch.int64})
    low, high = bound.get("low", 0), bound["high"]
    return (random.uniform(like) * (high - low)).floor_().add_(low).to(like.dtype)


def _normal(random: RowRandom, bound: _Bound) -> Any:
    mean, std = bound["mean"], bound.get("std", 1.0)
    if "size" in bound:
        like = _new(bound)
    elif isinstance(mean, torch.Tensor) and isinstance(std, torch.Tensor):
        like = torch.empty_like(torch.broadcast_tensors(mean, std)[0], dtype=mean.dtype)
    else:
        like = mean if isinstance(mean, torch.Tensor) else std
    return (random.normal(like) * std + mean).to(like.dtype)


def _bernoulli(random: RowRandom, bound: _Bound) -> Any:
    like = bound["self"]
    p = like if bound.get("p") is None else bound["p"]
    return (random.uniform(like) < p).to(like.dtype)


def _multinomial(random: RowRandom, bound: _Bound) -> Any:
    # Of exponential numbers with rates p, the one of k is the least with probability p[k].
    p, count = bound["self"], bound["num_samples"]
    if not bound["replacement"]:
        return (p / random.exponential(p)).topk(count).indices
    one = p.unsqueeze(-2).expand(*p.shape[:-1], count, p.shape[-1])
    return (one / random.exponential(one)).argmax(-1)


def _uniform_(random: RowRandom, bound: _Bound) -> Any:
    like, low, high = bound["self"], bound["from"], bound["to"]
    filled = like.copy_(_within(random.uniform(like), like.dtype))
    return filled.mul_(high - low).add_(low)


def _normal_(random: RowRandom, bound: _Bound) -> Any:
    like = bound["self"]
    return like.copy_(random.normal(like) * bound["std"] + bound["mean"])


def _bernoulli_(random: RowRandom, bound: _Bound) -> Any:
    return bound["self"].copy_(_bernoulli(random, bound))


def _exponential_(random: RowRandom, bound: _Bound) -> Any:
    like = bound["self"]
    return like.copy_(random.exponential(like) / bound["lambd"])


def _within(uniform: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Fewer bits, none of which may round up to 1."""
    return uniform.to(dtype).clamp_(max=1 - torch.finfo(dtype).eps / 2)


_DRAWS: dict[str, Callable[[RowRandom, _Bound], Any]] = {
    "rand": _rand,
    "rand_like": _rand,
    "randn": _randn,
    "randn_like": _randn,
    "randint": _randint,
    "normal": _normal,
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "uniform_": _uniform_,
    "normal_": _normal_,
    "bernoulli_": _bernoulli_,
    "exponential_": _exponential_,
}
