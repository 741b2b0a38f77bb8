"""The command: what it reads, what it answers, and what it says of mistakes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from aioinfer.simulate import horizon, main
from aioinfer.simulation import (
    Bimodal,
    Bursts,
    Clients,
    Constant,
    Exponential,
    LinearCost,
    Measured,
    MeasuredCost,
    Pareto,
    ThinkTime,
    Uniform,
    simulate,
)
from aioinfer.simulation.notation import forward_cost, seconds, think_time

BASIC = ["--actors", "4", "--think", "3ms", "--forward", "1ms"]
SHORT = ["--duration", "1", "--warmup", "0.2"]


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """What the command answers, as JSON."""
    main([*arguments, "--json"])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


# -- notation -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2.0), ("0.5s", 0.5), ("20ms", 0.02), ("1.5 us", 1.5e-6), ("1e-3", 1e-3), (".5MS", 5e-4)],
)
def test_times(text: str, value: float):
    """A time is in seconds unless a unit follows."""
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "ms", "-1ms", "1m", "1 2", "nan", "inf", "1.2.3"])
def test_what_is_no_time(text: str):
    """Anything else is refused, with what was read."""
    with pytest.raises(ValueError, match="a time must be") as error:
        seconds(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20ms", Constant(0.02)),
        ("constant:20ms", Constant(0.02)),
        ("uniform:1ms,2ms", Uniform(0.001, 0.002)),
        ("exponential:0.5s", Exponential(0.5)),
        ("pareto:2ms,1.5", Pareto(0.002, 1.5)),
        ("bimodal:2ms,50ms,0.25", Bimodal(0.002, 0.05, 0.25)),
        ("bursts:2s,0.5,uniform:1s,2s", Bursts(Uniform(1, 2), 2, 0.5)),
    ],
)
def test_think_times(text: str, value: ThinkTime):
    """Every distribution can be written."""
    assert think_time(text) == value


def test_measured_think_times(tmp_path: Path):
    """A file of times is drawn from, and all of it."""
    (tmp_path / "times").write_text("1ms\n0.002\n3ms\n")
    think = think_time(f"file:{tmp_path / 'times'}")
    assert think == Measured((0.001, 0.002, 0.003))
    rng = random.Random(0)
    assert {think.sample(rng, 0.0) for _ in range(50)} == {0.001, 0.002, 0.003}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gauss:1,2", "must be one of"),
        ("uniform:1ms", "must be one of"),
        ("uniform:2,1", "high must be >= 2"),
        ("exponential:0", "mean must be > 0"),
        ("bimodal:1,2,1.5", "share_of_long must be >= 0 and <= 1, got 1.5"),
        ("pareto:1,x", "must be a number, got 'x'"),
        ("pareto:1,0", "shape must be > 0"),
        ("bursts:1,0,1ms", "active must be > 0 and <= 1"),
        ("file:/no/such/file", "/no/such/file must be a file"),
        ("soon", "a time must be"),
    ],
)
def test_what_is_no_think_time(text: str, message: str):
    """The message says what is allowed."""
    with pytest.raises(ValueError, match=message):
        think_time(text)


def test_an_empty_file_holds_no_think_times(tmp_path: Path):
    """Nothing to draw from is an error."""
    (tmp_path / "times").touch()
    with pytest.raises(ValueError, match="at least one think time"):
        think_time(f"file:{tmp_path / 'times'}")


def test_costs():
    """Constant, linear, or a line through measured points, level beyond a single one."""
    assert forward_cost("2ms") == LinearCost(0.002, 0.0)
    assert forward_cost("2ms+10us*rows")(100) == pytest.approx(0.003)
    measured = forward_cost("1:1ms,9:3ms,17:4ms")
    assert [measured(rows) for rows in (1, 5, 9, 13, 17, 25)] == pytest.approx(
        [0.001, 0.002, 0.003, 0.0035, 0.004, 0.005]
    )
    assert forward_cost("8:2ms")(1) == forward_cost("8:2ms")(64) == 0.002


def test_noise_does_not_make_large_batches_free():
    """Beyond points of which the last happened to be cheaper, the cost does not fall further."""
    assert MeasuredCost({1: 0.002, 2: 0.001})(1000) == 0.001


@pytest.mark.parametrize("text", ["", "0", "1:x", "0:1ms", "1:0", "1ms+2", "a*rows", "1,2"])
def test_what_is_no_cost(text: str):
    """The message says what is allowed, and what was read."""
    with pytest.raises(ValueError, match="a cost must be one of") as error:
        forward_cost(text)
    assert repr(text) in str(error.value)


# -- the command --------------------------------------------------------------


def test_it_answers_what_the_simulator_does(capsys: pytest.CaptureFixture[str]):
    """The command is the simulator with these arguments, and adds who waits how much."""
    (run,) = command(
        capsys, "--actors", "8", "--think", "exponential:4ms", "--forward", "1ms+100us*rows",
        "--network", "100us", "--rows", "2", "--max-batch-size", "16", "--seed", "5", *SHORT,
    )  # fmt: skip
    result = simulate(
        [Clients(8, Exponential(0.004), rows=2)], LinearCost(0.001, 0.0001),
        network=0.0001, max_batch_size=16, seed=5, duration=1.0, warmup=0.2,
    )  # fmt: skip
    assert run["rows_per_s"] == result.throughput
    assert run["mean_batch_size"] == result.mean_batch_size
    assert run["p99_latency_ms"] == result.p99_latency * 1000
    waits = run["share_of_time_waiting"]
    assert waits == pytest.approx(result.mean_latency / (result.mean_latency + 0.004), rel=0.05)


def test_every_number_of_actors_meets_every_number_of_replicas(capsys: pytest.CaptureFixture[str]):
    """Two and three give six rows of a table, in order, with as many figures as headings."""
    arguments = ["--think", "1ms", "--forward", "5ms", "--duration", "0.2", "--warmup", "0.1"]
    main(["--actors", "8", "16", "--replicas", "1", "2", "3", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-6:]] == [
        [actors, replicas] for actors in ("8", "16") for replicas in "123"
    ]
    assert len(lines[-6].split()) == len(lines[-7].split())


def test_by_itself_it_runs_as_long_as_needed():
    """Everybody has a turn in the warm-up and in what is counted; few actors have many."""
    cost = LinearCost(0.001)
    for count, least in ((1, 100_000), (1000, 100), (1_000_000, 1)):
        clients = Clients(count, Constant(0.1))
        warmup, duration = horizon(clients, cost, 1, 10_000_000, 0.0)
        assert warmup >= 1.5 * 0.101
        assert duration >= least * 0.101
    # Where the executor is what limits, a turn takes as long as it needs for all of them.
    _, duration = horizon(Clients(1_000_000, Constant(0.1)), cost, 2, 100, 0.0)
    assert duration >= 1_000_000 / 100 / 2 * 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--actors", "0"], "argument --actors: must be a whole number of at least 1, got '0'"),
        (["--replicas", "2", "x"], "argument --replicas: must be a whole number of at least 1"),
        (["--think", "gauss:1"], "argument --think: a think time must be one of"),
        (["--forward", "1:x"], "argument --forward: a cost must be one of"),
        (["--network", "-1"], "argument --network: "),
        (["--duration", "0"], "argument --duration: must be more than 0, got '0'"),
        (["--min-batch-size", "65"], "--min-batch-size: must be at most --max-batch-size, 64"),
        (["--rows", "65"], "argument --rows: must be at most --max-batch-size, 64, got 65"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    """What is wrong is said in terms of the argument, its value and what is allowed."""
    with pytest.raises(SystemExit):
        main([*BASIC, *arguments])
    assert message in capsys.readouterr().err


def test_help_says_how_to_write_it(capsys: pytest.CaptureFixture[str]):
    """All think times and costs are in ``--help``."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for word in ("exponential:MEAN", "ROWS:TIME", "--network"):
        assert word in shown
