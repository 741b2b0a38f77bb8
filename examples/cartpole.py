"""Many actors, one policy: CartPole with and without an inference server.

Each actor owns a gymnasium CartPole-v1 environment and asks the policy for an action at every
step. The program measures the same actors twice: first each of them calls the policy itself,
one observation at a time; then all of them ask one ``InferenceServer``, which answers them in
batches. Nothing is learnt here; the policy samples from random weights.

    python examples/cartpole.py                 # 64 asyncio actors
    python examples/cartpole.py --threads       # 64 threads instead
    python examples/cartpole.py --help          # the other options
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import gymnasium
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from tqdm import tqdm

from aioinfer import AsyncioTransport, InferenceServer, ServerStats, ThreadingTransport

try:
    from uvloop import new_event_loop
except ImportError:  # uvloop does not exist for every platform
    from asyncio import new_event_loop

Choose = Callable[[TensorDict], TensorDict]
"""What a thread actor calls at every step: request in, action out."""
AsyncChoose = Callable[[TensorDict], Awaitable[TensorDict]]
"""The same for an asyncio actor."""

REPORT_EVERY = 25
"""Steps between two movements of the progress bar."""


class Sampler(nn.Module):
    """A two-layer actor network that samples its action."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.logits = nn.Sequential(
            nn.Linear(4, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 2),
        )

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Map observations ``[..., 4]`` to actions ``[...]``."""
        return torch.multinomial(self.logits(observation).softmax(-1), 1).squeeze(-1)


class CartPole:
    """One actor's environment, as a source of requests and a sink of answers."""

    def __init__(self, seed: int) -> None:
        self._env = gymnasium.make("CartPole-v1")
        self._observation, _ = self._env.reset(seed=seed)
        self.episodes = 0

    def request(self) -> TensorDict:
        """Return the present observation as the policy wants it."""
        return TensorDict({"observation": torch.from_numpy(self._observation)})

    def step(self, answer: TensorDict) -> None:
        """Act on the policy's answer; start a new episode where one has ended."""
        self._observation, _, terminated, truncated, _ = self._env.step(answer["action"].item())
        if terminated or truncated:
            self.episodes += 1
            self._observation, _ = self._env.reset()


class Run(NamedTuple):
    """One measurement."""

    seconds: float
    steps: int
    episodes: int

    @property
    def steps_per_s(self) -> float:
        """Environment steps per second, of all actors together."""
        return self.steps / self.seconds


class Progress:
    """The progress bar, in steps of all actors; any thread may move it."""

    def __init__(self, title: str, steps: int) -> None:
        self._bar = tqdm(total=steps, desc=f"{title:>10}", unit=" steps", unit_scale=True)
        self._lock = threading.Lock()

    def add(self, steps: int) -> None:
        """Count steps that were made."""
        with self._lock:
            self._bar.update(steps)

    def close(self) -> None:
        """Leave the bar as it is on the screen."""
        self._bar.close()


# -- asyncio actors -----------------------------------------------------------


async def asyncio_actor(
    env: CartPole, steps: int, connect: Callable[[], AsyncChoose], progress: Progress
) -> None:
    """Step one environment; `connect` gives this actor its own way to the policy."""
    choose = connect()
    for start in range(0, steps, REPORT_EVERY):
        chunk = min(REPORT_EVERY, steps - start)
        for _ in range(chunk):
            env.step(await choose(env.request()))
        progress.add(chunk)
        await asyncio.sleep(0)  # without a server nothing above lets other tasks, or Ctrl-C, in


async def run_asyncio(
    title: str, args: argparse.Namespace, connect: Callable[[], AsyncChoose]
) -> Run:
    """Step all environments, one task each, and measure."""
    envs = [CartPole(args.seed + i) for i in range(args.actors)]
    progress = Progress(title, args.actors * args.steps)
    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as actors:
            for env in envs:
                actors.create_task(asyncio_actor(env, args.steps, connect, progress))
        seconds = time.perf_counter() - started
    finally:
        progress.close()
    return Run(seconds, args.actors * args.steps, sum(env.episodes for env in envs))


async def measure_asyncio(
    policy: TensorDictModule, args: argparse.Namespace
) -> tuple[Run, Run, ServerStats]:
    """Measure asyncio actors that call the policy, then the same actors served."""

    @torch.no_grad()
    def call(td: TensorDict) -> TensorDict:
        return policy(td)

    async def direct(td: TensorDict) -> TensorDict:
        return call(td)

    own = await run_asyncio("on its own", args, lambda: direct)
    transport = AsyncioTransport()
    async with InferenceServer(policy, transport, max_batch_size=args.max_batch_size) as server:
        served = await run_asyncio("served", args, transport.async_client)
        return own, served, server.stats()


# -- thread actors ------------------------------------------------------------


def thread_actor(
    env: CartPole,
    steps: int,
    connect: Callable[[], Choose],
    progress: Progress,
    stop: threading.Event,
) -> None:
    """Step one environment; `connect` gives this actor its own way to the policy."""
    choose = connect()
    for start in range(0, steps, REPORT_EVERY):
        chunk = min(REPORT_EVERY, steps - start)
        for _ in range(chunk):
            env.step(choose(env.request()))
        progress.add(chunk)
        if stop.is_set():
            return


def run_threads(title: str, args: argparse.Namespace, connect: Callable[[], Choose]) -> Run:
    """Step all environments, one thread each, and measure."""
    envs = [CartPole(args.seed + i) for i in range(args.actors)]
    progress = Progress(title, args.actors * args.steps)
    stop = threading.Event()
    started = time.perf_counter()
    with ThreadPoolExecutor(args.actors) as pool:
        try:
            actors = [
                pool.submit(thread_actor, env, args.steps, connect, progress, stop) for env in envs
            ]
            for actor in as_completed(actors):
                actor.result()
            seconds = time.perf_counter() - started
        finally:  # after Ctrl-C, or the error of one actor, the others end too
            stop.set()
            progress.close()
    return Run(seconds, args.actors * args.steps, sum(env.episodes for env in envs))


def measure_threads(
    policy: TensorDictModule, args: argparse.Namespace
) -> tuple[Run, Run, ServerStats]:
    """Measure thread actors that call the policy, then the same actors served."""

    @torch.no_grad()
    def direct(td: TensorDict) -> TensorDict:
        return policy(td)

    own = run_threads("on its own", args, lambda: direct)
    transport = ThreadingTransport()
    with InferenceServer(policy, transport, max_batch_size=args.max_batch_size) as server:
        served = run_threads("served", args, transport.sync_client)
        return own, served, server.stats()


# -- the program --------------------------------------------------------------


def report(own: Run, served: Run, stats: ServerStats) -> str:
    """Write what was measured as a table."""
    lines = [f"{'':24}{'steps/s':>10}{'seconds':>10}{'episodes':>10}"]
    for name, run in (("every actor on its own", own), ("served", served)):
        lines.append(f"{name:24}{run.steps_per_s:10,.0f}{run.seconds:10.2f}{run.episodes:10,}")
    lines.append(f"{'served / on its own':24}{served.steps_per_s / own.steps_per_s:10.2f}")
    lines += ["", "the server", str(stats)]
    return "\n".join(lines)


def at_least_one(text: str) -> int:
    """Parse an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve one policy to many CartPole actors.")
    parser.add_argument("--actors", type=at_least_one, default=64, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=at_least_one, default=2000, help="per actor; default: %(default)s"
    )
    parser.add_argument("--threads", action="store_true", help="actors are threads, not tasks")
    parser.add_argument(
        "--hidden", type=at_least_one, default=64, help="units per layer; default: %(default)s"
    )
    parser.add_argument("--max-batch-size", type=at_least_one, default=64, metavar="ROWS")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; return the exit status."""
    args = parse(argv)
    # Layers this small are faster on one core than split over several. More threads would
    # only compete with the actors, and with `--threads` every actor would bring its own set.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    policy = TensorDictModule(Sampler(args.hidden), in_keys=["observation"], out_keys=["action"])
    kind = "threads" if args.threads else "asyncio tasks"
    print(
        f"CartPole-v1: {args.actors} actors ({kind}), {args.steps} steps each, "
        f"policy 4-{args.hidden}-{args.hidden}-2",
        flush=True,
    )
    try:
        if args.threads:
            measured = measure_threads(policy, args)
        else:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                measured = runner.run(measure_asyncio(policy, args))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print("\n" + report(*measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
