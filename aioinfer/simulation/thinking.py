"""How long a client takes from an answer to its next request."""

from __future__ import annotations

import abc
import dataclasses
import random
from collections.abc import Sequence


class ThinkTime(abc.ABC):
    """How long a client takes from an answer to its next request."""

    @abc.abstractmethod
    def sample(self, rng: random.Random, now: float) -> float:
        """Draw a think time, in seconds, for an answer received at ``now``."""


@dataclasses.dataclass(frozen=True)
class Constant(ThinkTime):
    """Always the same."""

    seconds: float

    def __post_init__(self) -> None:
        _check("seconds", self.seconds)

    def sample(self, rng: random.Random, now: float) -> float:
        return self.seconds


@dataclasses.dataclass(frozen=True)
class Uniform(ThinkTime):
    """Evenly between two bounds."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check("low", self.low)
        _check("high", self.high, least=self.low)

    def sample(self, rng: random.Random, now: float) -> float:
        return rng.uniform(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Exponential(ThinkTime):
    """Memoryless, with this mean."""

    mean: float

    def __post_init__(self) -> None:
        _check("mean", self.mean, above=0)

    def sample(self, rng: random.Random, now: float) -> float:
        return rng.expovariate(1.0 / self.mean)


@dataclasses.dataclass(frozen=True)
class Pareto(ThinkTime):
    """Heavy-tailed: mostly near ``minimum``, now and then much longer.

    ``shape`` above 1 has a mean, ``minimum * shape / (shape - 1)``; above 2 a variance.
    """

    minimum: float
    shape: float = 1.5

    def __post_init__(self) -> None:
        _check("minimum", self.minimum)
        _check("shape", self.shape, above=0)

    def sample(self, rng: random.Random, now: float) -> float:
        return self.minimum * rng.paretovariate(self.shape)


@dataclasses.dataclass(frozen=True)
class Bimodal(ThinkTime):
    """Mostly short, sometimes long (an environment that resets, say)."""

    short: float
    long: float
    share_of_long: float

    def __post_init__(self) -> None:
        _check("short", self.short)
        _check("long", self.long)
        _check("share_of_long", self.share_of_long, most=1)

    def sample(self, rng: random.Random, now: float) -> float:
        return self.long if rng.random() < self.share_of_long else self.short


@dataclasses.dataclass(frozen=True)
class Bursts(ThinkTime):
    """``think``, but at the end of every ``period`` all pause until the next one starts.

    ``active`` is the share of the period in which they ask.
    """

    think: ThinkTime
    period: float
    active: float

    def __post_init__(self) -> None:
        _check("period", self.period, above=0)
        _check("active", self.active, above=0, most=1)

    def sample(self, rng: random.Random, now: float) -> float:
        done = now + self.think.sample(rng, now)
        phase = done % self.period
        if phase > self.active * self.period:
            done += self.period - phase
        return done - now


@dataclasses.dataclass(frozen=True)
class Measured(ThinkTime):
    """One of those that were measured, each as likely as the others."""

    seconds: Sequence[float] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("seconds must hold at least one think time, got none")
        _check("seconds", min(self.seconds))
        _check("seconds", max(self.seconds))

    def sample(self, rng: random.Random, now: float) -> float:
        return self.seconds[int(rng.random() * len(self.seconds))]


def _check(
    name: str,
    value: float,
    *,
    least: float = 0,
    above: float | None = None,
    most: float = 1e9,
) -> None:
    """Refuse what is out of bounds, and what is not a number."""
    if least <= value <= most and (above is None or value > above):
        return
    bound = f">= {least:g}" if above is None else f"> {above:g}"
    raise ValueError(f"{name} must be {bound} and <= {most:g}, got {value!r}")
