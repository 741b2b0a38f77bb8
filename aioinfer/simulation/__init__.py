"""Servers and their clients in virtual time, driving the very batcher that serves.

Use it to size a system before it exists: so many actors that think for so long, a forward
that costs so much, and the settings of a server::

    from aioinfer.simulation import Clients, Constant, Exponential, simulate

    result = simulate(
        [Clients(60, Exponential(0.004)), Clients(4, Constant(0.05))],
        forward_cost=lambda rows: 0.001 + 0.0001 * rows,
        max_batch_size=64,
        duration=10.0,
    )
    print(result.throughput, result.p99_latency)

Every client is a closed loop: it asks, waits for the answer, thinks, and asks again. Nothing
but thinking, waiting, the forward and, if it is told to, the network takes time. Times are in
seconds. The same arguments and seed give the same result, to the last bit.

``python -m aioinfer.simulate`` asks the same from the command line.
"""

from aioinfer.simulation.costs import LinearCost, MeasuredCost
from aioinfer.simulation.engine import simulate
from aioinfer.simulation.records import Clients, SimulationResult
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

__all__ = [
    "Bimodal",
    "Bursts",
    "Clients",
    "Constant",
    "Exponential",
    "LinearCost",
    "Measured",
    "MeasuredCost",
    "Pareto",
    "SimulationResult",
    "ThinkTime",
    "Uniform",
    "simulate",
]
