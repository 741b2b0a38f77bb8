"""The simulator: against what can be worked out by hand, and the batcher against its oracle."""

from __future__ import annotations

import gc

import pytest

from aioinfer.simulation import (
    Bimodal,
    Bursts,
    Clients,
    Constant,
    Exponential,
    LinearCost,
    Pareto,
    ThinkTime,
    Uniform,
    simulate,
)


def test_one_client_takes_turns_with_the_executor():
    """Think 1 ms, forward 2 ms: 333 rows a second, busy two thirds of the time."""
    result = simulate([Clients(1, Constant(0.001))], lambda rows: 0.002, duration=3.0)
    assert result.throughput == pytest.approx(1000 / 3, rel=0.01)
    assert result.utilisation == pytest.approx(2 / 3, rel=0.01)
    assert result.p99_latency == pytest.approx(0.002)


@pytest.mark.parametrize(
    "think",
    [
        Constant(0.004),
        Uniform(0.002, 0.006),
        Exponential(0.004),
        Pareto(0.002, 2.5),
        Bimodal(0.002, 0.02, 0.1),
        Bursts(Exponential(0.004), 0.5, 0.5),
    ],
)
def test_littles_law_holds_and_the_seed_decides(think: ThinkTime):
    """Clients = throughput x (think + latency), and the same seed gives the same result."""
    runs = [
        simulate([Clients(16, think)], lambda rows: 0.001, duration=4.0, warmup=0.5, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1]
    if think != Constant(0.004):
        assert runs[0] != runs[2]
    in_service = runs[0].throughput * runs[0].mean_latency
    assert 0 < in_service < 16


def test_exponential_callers_obey_littles_law():
    """With a mean think time of 4 ms the law gives the number of clients."""
    result = simulate([Clients(16, Exponential(0.004))], lambda rows: 0.001, duration=20.0)
    assert result.throughput * (0.004 + result.mean_latency) == pytest.approx(16, rel=0.03)


def test_rows_of_a_request_count():
    """Requests of four rows: four times as many rows as requests, and batches within the limit."""
    clients = [Clients(8, Exponential(0.002), rows=4)]
    result = simulate(clients, lambda rows: 0.001, max_batch_size=16)
    assert result.rows == 4 * result.requests
    assert max(result.batch_sizes) <= 16


def test_requests_larger_than_a_group_are_served():
    """A lone caller of two rows that thinks for long is never divided into nothing."""
    clients = [Clients(1, Constant(0.0347), rows=2)]
    result = simulate(clients, lambda rows: 0.00312 + 0.00137 * rows, duration=2.0)
    assert result.requests == pytest.approx(2.0 / (0.0347 + 0.00586), rel=0.05)


def test_clients_come_and_go():
    """Clients that join after the end, or leave before the count begins, ask nothing."""
    late = Clients(8, Constant(0.001), joins_at=9.0)
    gone = Clients(8, Constant(0.001), leaves_at=0.5)
    result = simulate([late, gone], lambda rows: 0.001, duration=1.0, warmup=1.0)
    assert result.requests == 0


def test_who_gives_up_is_counted():
    """Requests with a timeout shorter than any forward time out, every one."""
    clients = [Clients(4, Constant(0.001), timeout=0.005)]
    result = simulate(clients, lambda rows: 0.05, duration=2.0)
    assert result.requests == 0
    assert result.timed_out > 50


def test_signatures_never_share_a_batch():
    """Two kinds of clients with two rows each: no batch holds more than one kind's rows."""
    clients = [Clients(2, Constant(0.001), signature=kind) for kind in ("a", "b")]
    result = simulate(clients, lambda rows: 0.002, duration=1.0)
    assert max(result.batch_sizes) == 2


def test_no_request_is_held_beyond_the_timeout():
    """While the executor is free nobody waits longer than ``timeout``, whatever the setting."""
    result = simulate(
        [Clients(12, Exponential(0.01))],
        lambda rows: 0.001,
        min_batch_size=12,
        timeout=0.003,
        duration=4.0,
    )
    assert 0.002 < result.longest_hold <= 0.003 + 1e-9


WORKLOADS = {
    "jittered lock-step": ([Clients(32, Uniform(0.0015, 0.0025))], (0.004, 0.00005)),
    "exponential": ([Clients(32, Exponential(0.005))], (0.002, 0.0001)),
    "bimodal": ([Clients(64, Bimodal(0.002, 0.05, 0.05))], (0.003, 0.00005)),
    "two speeds": ([Clients(48, Constant(0.002)), Clients(16, Constant(0.02))], (0.003, 0.00005)),
    "stragglers": ([Clients(30, Constant(0.002)), Clients(2, Constant(0.05))], (0.002, 0.00005)),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_default_is_near_the_best_static_setting(name: str):
    """Untuned, throughput is at least 0.95 of the best of a grid, p99 at most 1.5 of its p99."""
    clients, (fixed, per_row) = WORKLOADS[name]

    def run(**settings: float | int) -> tuple[float, float]:
        result = simulate(
            clients, lambda rows: fixed + per_row * rows, duration=1.0, warmup=0.5, **settings
        )
        return result.throughput, result.p99_latency

    best, p99 = max(
        run(min_batch_size=minimum, timeout=timeout)
        for minimum in (1, 8, 16, 32, 48)
        for timeout in (0.001, 0.005, 0.01)
    )
    throughput, learnt_p99 = run()
    assert throughput >= 0.95 * best
    assert learnt_p99 <= 1.5 * p99


def test_groups_that_take_turns_emerge_by_themselves():
    """Where thinking takes longer than the fixed cost, no static setting is as fast."""
    clients = [Clients(64, Constant(0.006))]
    learnt, static = (
        simulate(clients, lambda rows: 0.003 + 0.00005 * rows, warmup=0.5, duration=2.0, **settings)
        for settings in ({}, {"min_batch_size": 1})
    )
    assert learnt.throughput > 1.1 * static.throughput
    assert learnt.mean_batch_size == pytest.approx(32, abs=1)


def test_groups_become_as_many_as_keep_the_executor_busy():
    """In lock-step, where rows cost more than forwards do, nobody waits for more than a few."""
    clients = [Clients(32, Constant(0.005))]
    learnt, static = (
        simulate(clients, LinearCost(0.0001, 0.00012), warmup=0.5, duration=2.0, **settings)
        for settings in ({}, {"min_batch_size": 1})
    )
    assert learnt.throughput > 1.4 * static.throughput
    assert learnt.p99_latency < 0.3 * static.p99_latency


def test_rows_that_come_at_random_are_left_as_they_come():
    """Near the limit of the executor, callers who are out of step are not divided further."""
    clients = [Clients(32, Uniform(0.004, 0.006))]
    learnt, static = (
        simulate(clients, LinearCost(0.0001, 0.00012), warmup=0.5, duration=2.0, **settings)
        for settings in ({}, {"min_batch_size": 1})
    )
    assert learnt.throughput > 0.98 * static.throughput
    assert learnt.p99_latency < 1.15 * static.p99_latency


# -- several replicas, and the network ----------------------------------------


def test_the_network_adds_a_way_there_and_a_way_back():
    """A lone client that thinks 1 ms waits for the forward of 2 ms and twice the network's."""
    result = simulate(
        [Clients(1, Constant(0.001))], LinearCost(0.002), network=0.0005, duration=4.0
    )
    assert result.p50_latency == pytest.approx(0.003)
    assert result.throughput == pytest.approx(1000 / 4, rel=0.01)
    assert result.utilisation == pytest.approx(2 / 4, rel=0.01)


def test_replicas_add_up():
    """What keeps one replica busy is done twice as fast by two, and both are busy."""
    clients = [Clients(256, Exponential(0.002))]
    one, two = (
        simulate(clients, LinearCost(0.004, 0.0001), replicas=n, duration=2.0, warmup=1.0)
        for n in (1, 2)
    )
    assert two.throughput > 1.7 * one.throughput
    assert len(two.utilisations) == 2
    assert min(two.utilisations) > 0.9


@pytest.mark.parametrize("per_process", [1, 8])
def test_few_requests_are_not_spread_thin(per_process: int):
    """What one replica has room for goes to one, in batches as large as if it were alone."""
    clients = [Clients(8, Exponential(0.002), per_process=per_process)]
    one, four = (
        simulate(clients, LinearCost(0.004), replicas=n, duration=2.0, warmup=0.5) for n in (1, 4)
    )
    assert four.mean_batch_size == pytest.approx(one.mean_batch_size, rel=0.1)
    assert sum(four.utilisations[1:]) < 0.05


def test_a_crowd_spreads_within_a_few_turns():
    """Many processes that all begin at the first of eight replicas are soon spread over all."""
    clients = [Clients(2000, Exponential(0.1), per_process=4)]
    cost = LinearCost(0.002, 0.0003)  # eight replicas have a quarter more than is asked of them
    result = simulate(clients, cost, replicas=8, max_batch_size=256, warmup=1.0, duration=0.5)
    assert result.throughput > 0.8 * 2000 / 0.1
    assert min(result.utilisations) > 0.9


def test_several_replicas_are_deterministic_too():
    """The same seed gives the same result, to the last bit, and another one another."""
    clients = [Clients(96, Exponential(0.004), per_process=4)]
    runs = [
        simulate(
            clients, LinearCost(0.002, 0.0001), replicas=3, room=16, network=0.0001,
            duration=0.5, seed=seed,
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("network", [0.0, 0.004])
def test_who_gives_up_goes_on(replicas: int, network: float):
    """A client whose request timed out, or whose answer comes too late, thinks and asks again."""
    clients = [Clients(4, Constant(0.001), timeout=0.005)]
    result = simulate(clients, LinearCost(0.05), replicas=replicas, network=network, duration=2.0)
    assert result.requests == 0
    turns = 4 * 2.0 / 0.006
    assert 0.99 * turns <= result.timed_out <= 1.2 * turns  # some are refused before their time


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"duration": 0}, "duration must be finite and > 0 seconds, got 0"),
        ({"warmup": -1}, "warmup must be finite and >= 0 seconds, got -1"),
        ({"network": float("nan")}, "network must be finite and >= 0 seconds, got nan"),
        ({"replicas": 0}, "replicas must be at least 1, got 0"),
        ({"room": 0}, "room must be None or at least 1, got 0"),
        ({"forward_cost": lambda rows: 0.0}, "forward_cost must be .* got 0.0 for 1 rows"),
    ],
)
def test_mistakes(settings: dict[str, object], message: str):
    """What is wrong is said in terms of the argument, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        simulate([Clients(1, Constant(0.001))], **{"forward_cost": LinearCost(0.001), **settings})


def test_the_collector_of_garbage_is_left_as_it_was():
    """It runs again after a simulation, which leaves it nothing to do."""
    gc.collect()
    gc.disable()
    try:
        clients = [Clients(10, Exponential(0.001), timeout=0.01)]
        simulate(clients, LinearCost(0.001), duration=0.2, replicas=2, network=0.001)
        assert not gc.isenabled()
        assert gc.collect() == 0
    finally:
        gc.enable()
    simulate(clients, LinearCost(0.001), duration=0.1)
    assert gc.isenabled()
