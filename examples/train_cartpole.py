"""The loop this library is for: actors collect while a learner trains.

32 actors step CartPole-v1 and ask an ``InferenceServer`` for every action. A PPO learner trains
on what they did, and after every update pushes its weights into the running server. The actors
are not stopped for that: an episode may begin under one version of the policy and end under
another. Every action comes with its log-probability and with the version that chose it; the
learner needs the first, and knows from the second how stale its data are.

    python examples/train_cartpole.py              # 32 coroutines, and the server beside them
    python examples/train_cartpole.py --processes  # 4 processes of them, one of the server
    python examples/train_cartpole.py --help       # the other options

The mean return passes 400 long before the end. Return and staleness are saved as a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from tqdm import tqdm

from aioinfer import (
    AsyncioTransport,
    InferenceClient,
    InferenceServer,
    InProcessWeightSyncScheme,
    MPTransport,
    ProcessInferenceServer,
    ServerStats,
    SharedMemWeightSyncScheme,
    WeightSyncScheme,
)

try:
    from uvloop import new_event_loop
except ImportError:  # uvloop does not exist for every platform
    from asyncio import new_event_loop

ACTORS = 32
"""Environments, each with a client of its own."""
FRAGMENT = 32
"""Steps that an actor makes before it hands them to the learner."""
MAX_STALENESS = 4
"""Versions that an action may be behind when it is learnt from; older ones are thrown away."""

EPOCHS, MINIBATCH, LEARNING_RATE = 8, 256, 1e-3
DISCOUNT, TRACE, CLIP = 0.99, 0.95, 0.2

Deliver = Callable[["Steps"], Awaitable[None]]
"""What an actor does with a fragment."""


# -- the policy ---------------------------------------------------------------


def mlp(outputs: int) -> nn.Sequential:
    """Make a network of two hidden layers."""
    return nn.Sequential(
        nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
    )


class Sampler(nn.Module):
    """Samples actions, and says how probable they were."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = mlp(outputs=2)

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map observations ``[B, 4]`` to actions and their log-probabilities, both ``[B]``."""
        log_probs = self.logits(observation).log_softmax(-1)
        action = torch.multinomial(log_probs.exp(), 1)
        return action.squeeze(-1), log_probs.gather(-1, action).squeeze(-1)


def make_policy(seed: int) -> TensorDictModule:
    """Make a policy; with `--processes`, the server's process makes its own."""
    torch.set_num_threads(1)  # layers this small are faster on one core
    torch.manual_seed(seed)
    return TensorDictModule(Sampler(), in_keys=["observation"], out_keys=["action", "log_prob"])


# -- the actors ---------------------------------------------------------------


class Steps(NamedTuple):
    """One step, or many: every field is an array of ``[steps]`` or ``[fragments, steps]``."""

    observation: Any
    action: Any
    log_prob: Any
    version: Any
    """Of the policy, when it chose the action."""
    reward: Any
    next_observation: Any
    terminated: Any
    done: Any
    """The episode ended with this step: the pole fell, or the time was up."""
    episode_return: Any
    """So far."""


async def actor(client: InferenceClient, seed: int, deliver: Deliver) -> None:
    """Step one environment for ever, and deliver the steps in fragments."""
    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=seed)
    episode_return = 0.0
    while True:
        fragment = []
        for _ in range(FRAGMENT):
            answer = await client(TensorDict({"observation": torch.from_numpy(observation)}))
            action = answer["action"].item()
            next_observation, reward, terminated, truncated, _ = env.step(action)
            episode_return += reward
            step = Steps(
                observation=observation,
                action=action,
                log_prob=answer["log_prob"].item(),
                version=answer["policy_version"].item(),
                reward=reward,
                next_observation=next_observation,
                terminated=terminated,
                done=terminated or truncated,
                episode_return=episode_return,
            )
            fragment.append(step)
            observation = next_observation
            if step.done:
                observation, _ = env.reset()
                episode_return = 0.0
        await deliver(Steps(*map(np.array, zip(*fragment, strict=True))))


async def run_actors(clients: list[InferenceClient], seed: int, deliver: Deliver) -> None:
    """Run actors, one coroutine each, until cancelled."""
    async with asyncio.TaskGroup() as actors:
        for i, client in enumerate(clients):
            actors.create_task(actor(client, seed + i, deliver))


# -- actors in processes ------------------------------------------------------


def make_context() -> Any:
    """A way to start processes that start fast and leave Ctrl-C to this one."""
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["aioinfer", "gymnasium"])  # import what is slow only once
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which all of them inherit
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    return ctx


def actor_process(clients: list[InferenceClient], seed: int, pipe: Connection) -> None:
    """Run actors in a process of their own; what they deliver goes through a pipe."""
    lock = asyncio.Lock()

    async def deliver(fragment: Steps) -> None:
        async with lock:
            await asyncio.to_thread(pipe.send, fragment)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run_actors(clients, seed, deliver))


async def run_processes(
    ctx: Any, count: int, clients: list[InferenceClient], seed: int, deliver: Deliver
) -> None:
    """Run actors, spread over processes, until cancelled."""

    async def relay(pipe: Connection) -> None:
        while True:
            await deliver(await asyncio.to_thread(pipe.recv))

    processes, pipes = [], []
    try:
        async with asyncio.TaskGroup() as relays:
            for i in range(count):
                ours, theirs = ctx.Pipe(duplex=False)
                work = (clients[i::count], seed + i * ACTORS, theirs)
                process = ctx.Process(target=actor_process, args=work)
                process.start()
                theirs.close()  # so that ours ends when the process does
                processes.append(process)
                pipes.append(ours)
                relays.create_task(relay(ours))
    finally:
        for process in processes:
            process.terminate()
            process.join()


# -- the learner --------------------------------------------------------------


class Learner:
    """Proximal policy optimisation: a policy, a critic, and how they learn from steps."""

    def __init__(self, seed: int, updates: int) -> None:
        self.policy = make_policy(seed)
        self._critic = mlp(outputs=1)
        self._parameters = [*self.policy.parameters(), *self._critic.parameters()]
        self._optimizer = torch.optim.Adam(self._parameters, LEARNING_RATE, eps=1e-5)
        self._schedule = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1.0, 0.0, updates)

    def update(self, steps: Steps) -> None:
        """Learn from fragments of steps, arrays of ``[fragments, steps]``."""
        batch = Steps(*map(torch.from_numpy, steps))
        advantage, target = self._estimate(batch)
        rows = [batch.observation, batch.action, batch.log_prob.float(), advantage, target]
        rows = [column.flatten(0, 1) for column in rows]
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(rows[0])).split(MINIBATCH):
                loss = self._loss(*(column[chosen] for column in rows))
                self._optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self._parameters, 0.5)
                self._optimizer.step()
        self._schedule.step()

    @torch.no_grad()
    def _estimate(self, batch: Steps) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate the advantages (GAE) and what the critic should have said."""
        value = self._critic(batch.observation).squeeze(-1)
        next_value = self._critic(batch.next_observation).squeeze(-1) * ~batch.terminated
        error = batch.reward.float() + DISCOUNT * next_value - value
        advantage = torch.zeros_like(error)
        following = torch.zeros(len(error))
        for t in reversed(range(error.shape[1])):
            following = error[:, t] + DISCOUNT * TRACE * following * ~batch.done[:, t]
            advantage[:, t] = following
        return advantage, advantage + value

    def _loss(
        self,
        observation: torch.Tensor,
        action: torch.Tensor,
        old_log_prob: torch.Tensor,
        advantage: torch.Tensor,
        target: torch.Tensor,
    ) -> torch.Tensor:
        log_probs = self.policy.module.logits(observation).log_softmax(-1)
        ratio = (log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1) - old_log_prob).exp()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        critic_loss = nn.functional.mse_loss(self._critic(observation).squeeze(-1), target)
        return 0.5 * critic_loss - gain.mean()


class Update(NamedTuple):
    """What was known at one update of the policy."""

    seconds: float
    """Since the actors began."""
    steps: int
    """Steps learnt from until then."""
    mean_return: float
    """Of the last 100 episodes."""
    staleness: float
    """Versions between the one that chose an action and the newest; the mean of this update."""
    max_staleness: int


async def take(fragments: asyncio.Queue[Steps], version: int) -> Steps:
    """Take what the actors have delivered, at least as many fragments as there are actors."""
    taken: list[Steps] = []
    while len(taken) < ACTORS or not fragments.empty():
        fragment = await fragments.get()
        if version - fragment.version.min() <= MAX_STALENESS:
            taken.append(fragment)
    return Steps(*map(np.stack, zip(*taken, strict=True)))


async def learn(
    learner: Learner, weight_sync: WeightSyncScheme, fragments: asyncio.Queue[Steps], updates: int
) -> list[Update]:
    """Update the policy again and again, and what is served after each time."""
    history: list[Update] = []
    returns: deque[float] = deque(maxlen=100)
    steps = version = 0
    started = time.perf_counter()
    with tqdm(total=updates, unit=" updates") as bar:
        for _ in range(updates):
            batch = await take(fragments, version)
            staleness = version - batch.version
            await asyncio.to_thread(learner.update, batch)
            report = await weight_sync.asend(model=learner.policy)
            if not report.ok:
                raise RuntimeError(f"the server did not take the weights: {report}")
            version = report.version

            steps += staleness.size
            returns.extend(batch.episode_return[batch.done])
            seconds = time.perf_counter() - started
            mean_return = float(np.mean(returns)) if returns else 0.0
            history.append(Update(seconds, steps, mean_return, staleness.mean(), staleness.max()))
            bar.set_postfix_str(
                f"return {mean_return:.0f}, {steps / seconds:,.0f} steps/s, "
                f"version {version}, staleness {staleness.mean():.1f}"
            )
            bar.update()
    return history


# -- the program --------------------------------------------------------------


async def train(args: argparse.Namespace) -> tuple[list[Update], ServerStats]:
    """Train until all updates are made; return their history, and what the server did."""
    learner = Learner(args.seed, args.updates)
    weight_sync: WeightSyncScheme
    if args.processes:
        ctx = make_context()
        weight_sync = SharedMemWeightSyncScheme()
        server = ProcessInferenceServer(
            functools.partial(make_policy, args.seed),
            MPTransport(ctx),
            max_batch_size=ACTORS,
            weight_sync=weight_sync,
        )
        run = functools.partial(run_processes, ctx, args.processes)
    else:
        weight_sync = InProcessWeightSyncScheme()
        server = InferenceServer(
            make_policy(args.seed),
            AsyncioTransport(),
            max_batch_size=ACTORS,
            weight_sync=weight_sync,
        )
        run = run_actors
    weight_sync.init_on_sender(model=learner.policy)
    # Actors that are two updates ahead wait: what they did next would only become stale.
    fragments: asyncio.Queue[Steps] = asyncio.Queue(2 * ACTORS)
    async with aclosing(weight_sync), server, asyncio.TaskGroup() as group:
        clients = [server.async_client() for _ in range(ACTORS)]
        actors = group.create_task(run(clients, args.seed, fragments.put))
        history = await learn(learner, weight_sync, fragments, args.updates)
        stats = await asyncio.to_thread(server.stats)
        actors.cancel()
    return history, stats


def report(history: list[Update], stats: ServerStats) -> str:
    """Write how it went as a table."""
    lines = [f"{'':24}{'seconds':>10}{'updates':>10}{'steps':>10}{'return':>10}"]
    above = [("return above 400", i) for i, at in enumerate(history) if at.mean_return > 400]
    for name, i in [*above[:1], ("end", len(history) - 1)]:
        seconds, steps, mean_return, *_ = history[i]
        lines.append(f"{name:24}{seconds:10.1f}{i + 1:10}{steps:10,}{mean_return:10.1f}")
    last = history[-1]
    lines += [
        "",
        f"{'steps/s':24}{last.steps / last.seconds:10,.0f}",
        f"{'policy version':24}{stats.policy_version:10}",
        f"{'mean staleness':24}{np.mean([update.staleness for update in history]):10.2f}",
        f"{'largest staleness':24}{max(update.max_staleness for update in history):10}",
        f"{'mean batch, rows':24}{stats.avg_batch_size:10.1f}",
    ]
    return "\n".join(lines)


def plot(history: list[Update], path: Path) -> None:
    """Save return and staleness over time."""
    seconds = [update.seconds for update in history]
    figure = Figure(figsize=(8, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    top.plot(seconds, [update.mean_return for update in history])
    top.axhline(400, color="grey", linestyle=":")
    top.set_ylabel("mean return of 100 episodes")
    bottom.plot(seconds, [update.staleness for update in history], label="mean")
    bottom.plot(seconds, [update.max_staleness for update in history], ":", label="largest")
    bottom.set_ylabel("staleness, versions")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("seconds")
    bottom.legend(loc="lower right", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def at_least_one(text: str) -> int:
    """Parse an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train CartPole-v1 through an inference server.")
    parser.add_argument(
        "--processes",
        type=at_least_one,
        nargs="?",
        const=4,
        metavar="N",
        help="spread the actors over N processes (%(const)s), and serve them from one more",
    )
    parser.add_argument(
        "--updates", type=at_least_one, default=150, help="of the policy; default: %(default)s"
    )
    parser.add_argument(
        "--plot", type=Path, default=Path("plots/train_cartpole.png"), help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.processes is not None and args.processes > ACTORS:
        parser.error(f"argument --processes: must be at most {ACTORS}, got {args.processes}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the training; return the exit status."""
    args = parse(argv)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            history, stats = runner.run(train(args))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    plot(history, args.plot)
    print("\n" + report(history, stats))
    print(f"\nThe plot is in {args.plot}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
