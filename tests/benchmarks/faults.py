"""How soon who is left behind notices, and what a thousand killed clients leave behind: nothing.

Five things, each with the bound that the project promises:

-   clients in forked processes are killed one after the other, at moments that a seed decides:
    idle, with a request in their slot, while they wait, while they read. How long until the server
    has let go of each; and what descriptors, memory and shared memory grew by over all of them;
-   a server's process is killed while eight clients wait: how long until each of them knows;
-   a client is stopped (SIGSTOP) in the middle of its work: by how much more than the server's
    ``timeout`` the slowest answer to the others is late;
-   a program with a server and eight actors gets Ctrl-C: how long until all of it has ended.

    python tests/benchmarks/faults.py --clients 1000
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from in_process import Target, describe_machine, note, print_targets
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

import aioinfer

FORK: Any = multiprocessing.get_context("fork")
LARGE = 60_000
"""Numbers in an observation that goes through shared memory."""
PATIENCE_S = 20.0


def policy() -> TensorDictModule:
    """Double the observation; one that starts with a negative number takes for ever."""
    return TensorDictModule(_double, in_keys=["observation"], out_keys=["action"])


def _double(observation: torch.Tensor) -> torch.Tensor:
    if bool((observation[..., 0] < 0).any()):
        signal.pause() if FORK.current_process().name != "MainProcess" else time.sleep(60)
    return observation * 2


def row(value: float, width: int = 3) -> TensorDict:
    """A request of one row."""
    return TensorDict({"observation": torch.full((width,), float(value))})


def until(condition: Any, what: str) -> float:
    """Wait for it; return when it came true."""
    give_up_at = time.perf_counter() + PATIENCE_S
    while not condition():
        if time.perf_counter() > give_up_at:
            raise TimeoutError(f"{what} did not come true within {PATIENCE_S:g} s")
        time.sleep(0.0002)
    return time.perf_counter()


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- killed clients -----------------------------------------------------------


def ask_for_ever(client: Any, width: int, pipe: Any) -> None:
    """Ask, say so, and go on asking until killed."""
    torch.set_num_threads(1)
    td = row(1, width)
    client(td)
    pipe.send_bytes(b"x")
    while True:
        client(td)


def killed_clients(count: int, seed: int) -> dict[str, float]:
    """Kill them one after the other."""
    chance = random.Random(seed)
    transport = aioinfer.MPTransport(FORK)
    client = transport.sync_client()
    noticed: list[float] = []

    def kill_one() -> None:
        ours, theirs = FORK.Pipe()
        width = LARGE if chance.random() < 0.5 else 3
        process = FORK.Process(target=ask_for_ever, args=(client, width, theirs), daemon=True)
        process.start()
        theirs.close()
        ours.recv_bytes()
        time.sleep(chance.random() * 0.002)
        process.kill()
        killed_at = time.perf_counter()
        noticed.append(until(lambda: not transport._peers, "the end of a client") - killed_at)
        process.join()
        process.close()
        ours.close()

    with aioinfer.InferenceServer(policy(), transport) as server:
        for _ in range(min(50, count)):  # what is made once is made
            kill_one()
        gc.collect()
        descriptors, memory = len(os.listdir("/proc/self/fd")), resident()
        shared = len(os.listdir("/dev/shm"))
        for number in range(count):
            if number % 200 == 0:
                note(f"{number} of {count} clients killed")
            kill_one()
        gc.collect()
        assert server.is_alive
        return {
            "noticed_s": max(noticed),
            "noticed_median_s": statistics.median(noticed),
            "descriptors": len(os.listdir("/proc/self/fd")) - descriptors,
            "memory_mb": (resident() - memory) / 1e6,
            "shared": len(os.listdir("/dev/shm")) - shared,
        }


# -- a killed server ----------------------------------------------------------


def ask_the_impossible(client: Any, pipe: Any) -> None:
    """Wait for an answer that never comes; say when that was known."""
    client(row(1))
    pipe.send("connected")
    pipe.recv()
    try:
        client(row(-1))
    except aioinfer.ServerDiedError:
        pipe.send(time.perf_counter())


def killed_server(clients: int) -> float:
    """Seconds until the last client knew."""
    transport = aioinfer.MPTransport(FORK)
    server = aioinfer.ProcessInferenceServer(policy, transport).start()
    pipes = []
    for _ in range(clients):
        ours, theirs = FORK.Pipe()
        args = transport.sync_client(), theirs
        FORK.Process(target=ask_the_impossible, args=args, daemon=True).start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    time.sleep(0.2)  # they wait
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    killed_at = time.perf_counter()
    heard = [pipe.recv() for pipe in pipes]
    server.shutdown(timeout=0.0)
    return max(heard) - killed_at


# -- a stopped client ---------------------------------------------------------


def stopped_client(timeout_s: float, seconds: float) -> float:
    """By how much the slowest answer of the others was later than ``timeout_s``."""
    transport = aioinfer.MPTransport(FORK)
    client = transport.sync_client()
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=ask_for_ever, args=(client, 3, theirs), daemon=True)
    slowest = 0.0
    with aioinfer.InferenceServer(policy(), transport, timeout=timeout_s):
        process.start()
        ours.recv_bytes()
        mine = transport.sync_client()
        for _ in range(100):
            mine(row(1))
        os.kill(process.pid, signal.SIGSTOP)
        until_s = time.perf_counter() + seconds
        while (asked := time.perf_counter()) < until_s:
            mine(row(1))
            slowest = max(slowest, time.perf_counter() - asked)
        process.kill()
        process.join()
    return max(0.0, slowest - timeout_s)


# -- an interrupted program ---------------------------------------------------


def program(pipe: Any) -> None:
    """Be a program with a server and eight actors."""
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what Python says of an interrupt
    with aioinfer.ProcessInferenceServer(policy, aioinfer.MPTransport(FORK)) as server:
        actors = []
        for _ in range(8):
            ours, theirs = FORK.Pipe()
            args = (server.sync_client(), 3, theirs)
            actors.append(FORK.Process(target=ask_for_ever, args=args, daemon=True))
            actors[-1].start()
            ours.recv_bytes()
        pipe.send([server.pid, *[actor.pid for actor in actors]])
        signal.pause()


def runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def interrupted_program() -> float:
    """Seconds from Ctrl-C until all of it had ended."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=program, args=(theirs,))
    process.start()
    pids = [process.pid, *ours.recv()]
    os.killpg(process.pid, signal.SIGINT)
    interrupted_at = time.perf_counter()
    ended_at = until(lambda: not any(runs(pid) for pid in pids), "the end of the program")
    process.join()
    return ended_at - interrupted_at


def main(argv: list[str] | None = None) -> int:
    """Do it all; return the exit status: 0 if every bound holds."""
    parser = argparse.ArgumentParser(description="Measure what faults cost and leave behind.")
    parser.add_argument("--clients", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line there too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    killed = killed_clients(args.clients, args.seed)
    found = [
        Target("client killed: seconds until let go", killed["noticed_s"], 0.5, None, False),
        Target("  descriptors left", killed["descriptors"], 0, None, False),
        Target("  MB of memory left", killed["memory_mb"], 20, None, False),
        Target("  names in /dev/shm left", killed["shared"], 0, None, False),
        Target("server killed: seconds until 8 know", killed_server(8), 0.5, None, False),
        Target("client stopped: s beyond the timeout", stopped_client(0.05, 2.0), 0.1, None, False),
        Target("Ctrl-C: seconds until all has ended", interrupted_program(), 2.0, None, False),
    ]
    print_targets(found)
    report = {"benchmark": "faults", **describe_machine(), "killed": killed}
    report["bounds"] = [{"what": t.what, "measured": t.measured, "met": t.met} for t in found]
    line = json.dumps(report)
    print("\n" + line)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0 if all(target.met for target in found) else 1


if __name__ == "__main__":
    sys.exit(main())
