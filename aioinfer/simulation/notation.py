"""How times, think times and costs are written on a command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from aioinfer.simulation.costs import LinearCost, MeasuredCost
from aioinfer.simulation.thinking import (
    Bimodal,
    Bursts,
    Constant,
    Exponential,
    Measured,
    Pareto,
    ThinkTime,
    Uniform,
)

THINK_TIMES = """\
TIME or constant:TIME       always the same
uniform:LOW,HIGH            evenly between two times
exponential:MEAN            memoryless
pareto:MINIMUM,SHAPE        heavy-tailed; with SHAPE > 1 the mean is MINIMUM*SHAPE/(SHAPE-1)
bimodal:SHORT,LONG,SHARE    LONG with probability SHARE
bursts:PERIOD,ACTIVE,THINK  THINK, but all pause for the last 1-ACTIVE of each PERIOD
file:PATH                   measured: a file with one time a line"""

COSTS = """\
TIME                        the same for any number of rows
FIXED+PER_ROW*rows          two times
ROWS:TIME,ROWS:TIME,...     measured; a straight line from each to the next"""

_TIME = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*(us|ms|s|)", re.IGNORECASE)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def seconds(text: str) -> float:
    """Read a time: a number, in seconds unless ``us``, ``ms`` or ``s`` follows."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a time must be a number and maybe us, ms or s, got {text!r}")
    return float(match[1]) * _UNITS[match[2].lower()]


def think_time(text: str) -> ThinkTime:
    """Read a think time, written in one of the forms of ``THINK_TIMES``."""
    name, colon, rest = text.partition(":")
    if not colon:
        return Constant(seconds(text))
    if name == "file":
        return _measured(Path(rest))
    if name == "bursts" and rest.count(",") >= 2:
        period, active, think = rest.split(",", 2)
        return Bursts(think_time(think), seconds(period), _number(active))
    make, kinds = _FORMS.get(name, (None, ()))
    values = rest.split(",")
    if make is None or len(values) != len(kinds):
        raise ValueError(f"a think time must be one of\n{THINK_TIMES}\ngot {text!r}")
    return make(*[read(value) for read, value in zip(kinds, values, strict=True)])


def forward_cost(text: str) -> LinearCost | MeasuredCost:
    """Read what a forward costs, written in one of the forms of ``COSTS``."""
    try:
        if ":" in text:
            points = [point.split(":") for point in text.split(",")]
            return MeasuredCost({int(rows): seconds(time) for rows, time in points})
        fixed, _, per_row = text.partition("+") if text.endswith("*rows") else (text, "", "0")
        return LinearCost(seconds(fixed), seconds(per_row.removesuffix("*rows")))
    except ValueError as error:
        raise ValueError(f"a cost must be one of\n{COSTS}\ngot {text!r}: {error}") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"a share or a shape must be a number, got {text!r}") from None


def _measured(path: Path) -> Measured:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read: {error}") from error
    return Measured(tuple(seconds(line) for line in lines))


_FORMS: dict[str, tuple[Callable[..., ThinkTime], tuple[Callable[[str], float], ...]]] = {
    "constant": (Constant, (seconds,)),
    "uniform": (Uniform, (seconds, seconds)),
    "exponential": (Exponential, (seconds,)),
    "pareto": (Pareto, (seconds, _number)),
    "bimodal": (Bimodal, (seconds, seconds, _number)),
}
