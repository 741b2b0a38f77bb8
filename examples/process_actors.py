"""Actors in processes, and the policy in a process of its own.

Each process steps its own vectorised gymnasium environments, and asks for the actions of all of
them in one request. One ``ProcessInferenceServer`` answers all processes, in batches of the rows
of several. Nothing is learnt here; the policy samples from random weights.

    python examples/process_actors.py                    # 8 processes, 32 CartPoles each
    python examples/process_actors.py --env ALE/Pong-v5  # 8 Pongs each
    python examples/process_actors.py --help             # the other options

An Atari game is played by a convolutional network, from its last four frames as 84x84 bytes.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import signal
import sys
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import gymnasium
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from tqdm import tqdm

from aioinfer import MPTransport, ProcessInferenceServer, ServerStats, SyncInferenceClient

REPORT_EVERY = 10
"""Steps of a process between two movements of the progress bar."""


def is_atari(env: str) -> bool:
    """Whether an environment is a game of the Arcade Learning Environment."""
    return env.startswith("ALE/")


def make_envs(env: str, count: int) -> gymnasium.vector.VectorEnv:
    """Make the environments of one process; a step takes and gives arrays of `count` rows."""
    if not is_atari(env):
        return gymnasium.make_vec(env, count)
    import ale_py  # noqa: F401 - the Atari games; gymnasium knows them once this is imported

    return gymnasium.make_vec(env, count, num_threads=1)  # the processes are parallel enough


# -- the server's process -----------------------------------------------------


class Sampler(nn.Module):
    """Samples an action from a network's logits."""

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Map observations ``[B, ...]`` to actions ``[B]``."""
        return torch.multinomial(self.logits(observation).softmax(-1), 1).squeeze(-1)


class Pixels(nn.Module):
    """Turns bytes into numbers between 0 and 1."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames / 255


def make_policy(env: str, seed: int) -> TensorDictModule:
    """Build the policy; the server's process calls this when it starts."""
    torch.set_num_threads(1)  # the other cores are for the actors
    torch.manual_seed(seed)
    envs = make_envs(env, 1)
    shape, actions = envs.single_observation_space.shape, envs.single_action_space.n
    envs.close()
    if len(shape) == 1:
        logits = nn.Sequential(
            nn.Linear(shape[0], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, actions)
        )
    else:  # the network of "Human-level control through deep reinforcement learning", 2015
        logits = nn.Sequential(
            Pixels(),
            *(nn.Conv2d(shape[0], 32, 8, stride=4), nn.ReLU()),
            *(nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, actions)),
        )
    return TensorDictModule(Sampler(logits), in_keys=["observation"], out_keys=["action"])


# -- an actor's process -------------------------------------------------------


def actor(
    client: SyncInferenceClient, parent: Connection, env: str, count: int, steps: int, seed: int
) -> None:
    """Step `count` environments; tell the parent when they are ready, and the steps made."""
    torch.set_num_threads(1)
    envs = make_envs(env, count)
    observations, _ = envs.reset(seed=seed)
    parent.send("ready")
    parent.recv()  # the others are, too
    for start in range(0, steps, REPORT_EVERY):
        chunk = min(REPORT_EVERY, steps - start)
        for _ in range(chunk):
            request = TensorDict({"observation": torch.from_numpy(observations)}, [count])
            actions = client(request)["action"].numpy()
            observations, *_ = envs.step(actions)
        parent.send(chunk * count)
    envs.close()


# -- the parent ---------------------------------------------------------------


def make_context() -> Any:
    """A way to start processes that start fast and leave Ctrl-C to this one."""
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["aioinfer", "gymnasium"])  # import what is slow only once
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which all of them inherit
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    return ctx


def run(args: argparse.Namespace) -> tuple[float, ServerStats]:
    """Step all environments; return the seconds that took, and what the server did."""
    ctx = make_context()
    policy = functools.partial(make_policy, args.env, args.seed)
    rows = args.processes * args.envs
    with ProcessInferenceServer(policy, MPTransport(ctx), max_batch_size=rows) as server:
        processes, pipes = [], []
        try:
            for i in range(args.processes):
                ours, theirs = ctx.Pipe()
                work = (args.env, args.envs, args.steps, args.seed + i * args.envs)
                process = ctx.Process(target=actor, args=(server.sync_client(), theirs, *work))
                process.start()
                theirs.close()  # so that ours ends when the process does
                processes.append(process)
                pipes.append(ours)
            return watch(pipes, args.envs * args.steps), server.stats()
        finally:  # after Ctrl-C, or the error of one actor, the others end too
            for process in processes:
                process.terminate()
                process.join()


def watch(pipes: list[Connection], steps: int) -> float:
    """Let all actors make their `steps` at once, show it; return the seconds it took."""
    left = dict.fromkeys(pipes, steps)
    try:
        for pipe in pipes:
            pipe.recv()  # ready
        started = time.perf_counter()
        for pipe in pipes:
            pipe.send("go")
        with tqdm(total=len(pipes) * steps, unit=" steps", unit_scale=True) as bar:
            while left:
                for pipe in wait(list(left)):
                    made = pipe.recv()
                    bar.update(made)
                    left[pipe] -= made
                    if not left[pipe]:
                        del left[pipe]
        return time.perf_counter() - started
    except EOFError:
        raise RuntimeError("an actor ended before its time; see above") from None


# -- the program --------------------------------------------------------------


def report(args: argparse.Namespace, seconds: float, stats: ServerStats) -> str:
    """Write what was measured as a table."""
    steps = args.processes * args.envs * args.steps
    lines = [f"{'steps/s':24}{steps / seconds:10,.0f}", f"{'seconds':24}{seconds:10.2f}"]
    return "\n".join([*lines, "", "the server", str(stats)])


def at_least_one(text: str) -> int:
    """Parse an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve one policy to actors in processes.")
    parser.add_argument("--env", default="CartPole-v1", help="default: %(default)s")
    parser.add_argument("--processes", type=at_least_one, default=8, help="default: %(default)s")
    parser.add_argument(
        "--envs", type=at_least_one, help="per process; default: 32, or 8 for Atari"
    )
    parser.add_argument(
        "--steps", type=at_least_one, help="per environment; default: 5000, or 500 for Atari"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.envs = args.envs or (8 if is_atari(args.env) else 32)
    args.steps = args.steps or (500 if is_atari(args.env) else 5000)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; return the exit status."""
    args = parse(argv)
    print(
        f"{args.env}: {args.processes} processes with {args.envs} environments each, "
        f"{args.steps} steps; starting them",
        flush=True,
    )
    try:
        measured = run(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print("\n" + report(args, *measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
