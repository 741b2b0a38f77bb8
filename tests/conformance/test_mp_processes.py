"""The claims of the suite that can be made from afar, by callers in other processes.

Most of the suite holds the policy, looks into the server or moves its clock, so its callers must
live where the server does. What a caller itself can see is claimed here again, in spawned and in
forked processes, on both event loops, of a server in this process and of one in its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from children import Child, Said
from helpers import InThread, action, all_well, outcomes, row, rows, within
from tensordict import NonTensorData, TensorDict, lazy_stack
from tensordict.nn import TensorDictModule

from aioinfer import (
    InferenceServer,
    InvalidRequestError,
    ModelError,
    MPTransport,
    ProcessInferenceServer,
    ServerClosedError,
)
from aioinfer.transports.wire import RemoteTraceback

from .hooks import LOOPS

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

MAX_BATCH_SIZE = 8
LARGE = 60_000

Claim = Callable[[MPTransport], Awaitable[None]]
CLAIMS: dict[str, Claim] = {}


def claim(function: Claim) -> Claim:
    """Have it checked everywhere."""
    CLAIMS[function.__name__] = function
    return function


def _double(observation: torch.Tensor) -> torch.Tensor:
    if bool((observation < 0).any()):
        raise ValueError("negative")
    return observation * 2


def policy() -> TensorDictModule:
    """Action = 2 * observation; it fails on a negative one."""
    return TensorDictModule(_double, in_keys=["observation"], out_keys=["action"])


# -- what a caller sees -------------------------------------------------------


@claim
async def what_an_answer_is(transport: MPTransport) -> None:
    """The out_keys and the version, in the shape of the request, and nothing else."""
    client = transport.async_client()
    for td, size in ((row(3), []), (rows([1]), [1]), (rows([1, 2, 3]), [3])):
        answer = await within(client(td))
        assert sorted(answer.keys()) == ["action", "policy_version"]
        assert list(answer.batch_size) == size
        assert answer["policy_version"].dtype == torch.int64
        assert answer["policy_version"].shape == answer.batch_size
        assert action(answer) == (2 * td["observation"])[..., 0].tolist()


@claim
async def many_in_flight(transport: MPTransport) -> None:
    """Each of them gets its own rows."""
    clients = [transport.async_client() for _ in range(5)]
    futures = [clients[value % 5].submit(row(value)) for value in range(200)]
    answers = await within(asyncio.gather(*futures))
    assert [action(answer) for answer in answers] == [2 * value for value in range(200)]


@claim
async def more_rows_than_a_batch(transport: MPTransport) -> None:
    """A request is split as needed, and its answer joined again."""
    client = transport.async_client()
    for count in (MAX_BATCH_SIZE, MAX_BATCH_SIZE + 1, 5 * MAX_BATCH_SIZE + 3):
        answer = await within(client(rows(range(count))))
        assert action(answer) == [2 * value for value in range(count)]


@claim
async def any_layout(transport: MPTransport) -> None:
    """Widths, dtypes, more leaves, nested ones, other data: whatever comes next."""
    client = transport.async_client()
    for width in (1, 2, 7, 4000, LARGE, 0, 3):
        answer = await within(client(row(width, width)))
        assert answer["action"].tolist() == [2.0 * width] * width
    for dtype in (torch.float64, torch.int64, torch.uint8, torch.bfloat16):
        answer = await within(client(TensorDict({"observation": torch.full((3,), 4, dtype=dtype)})))
        assert answer["action"].dtype == dtype
        assert action(answer) == 8
    more = row(5)
    more["flag"] = torch.tensor(True)
    assert action(await within(client(more))) == 10
    more["deep", "down"] = torch.ones(2)
    assert action(await within(client(more))) == 10
    more["name"] = NonTensorData("an actor")
    assert action(await within(client(more))) == 10
    assert action(await within(client(lazy_stack([row(1), row(2)])))) == [2, 4]


@claim
async def memory_that_is_strided(transport: MPTransport) -> None:
    """Views, expanded and transposed tensors travel as what they show."""
    client = transport.async_client()
    square = torch.arange(9.0).view(3, 3)
    for observation in (square[:, 1], square.t()[0], torch.tensor([4.0]).expand(3)):
        answer = await within(client(TensorDict({"observation": observation})))
        assert answer["action"].tolist() == (2 * observation).tolist()


@claim
async def a_policy_that_fails(transport: MPTransport) -> None:
    """Its error, with the cause, is for who caused it; the others get their answers."""
    client = transport.async_client()
    futures = [client.submit(row(value)) for value in (1, -1, 2, -2, 3)]
    found = await outcomes(*futures)
    assert [action(answer) for answer in found[::2]] == [2, 4, 6]
    for error in found[1::2]:
        assert type(error) is ModelError
        assert type(error.__cause__) is RemoteTraceback
        assert "ValueError: negative" in str(error.__cause__)
    assert found[1] is not found[3]


@claim
async def what_is_refused(transport: MPTransport) -> None:
    """What cannot be served is an error for its caller, and the connection is none the worse."""
    client = transport.async_client()
    unpicklable = row(1)
    unpicklable["name"] = NonTensorData(lambda: None)
    nobodys = TensorDict({"other": torch.ones(3)})
    for td in (unpicklable, nobodys, TensorDict({}, [2, 2]), rows([])):
        with pytest.raises(InvalidRequestError):
            await within(client(td))
    with pytest.raises(TypeError, match="TensorDict"):
        await client({"observation": torch.ones(3)})  # type: ignore[arg-type]
    for wrong in ({"timeout": -1.0}, {"interaction_type": "sometimes"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            await client(row(1), **wrong)  # type: ignore[arg-type]
    assert action(await within(client(row(2)))) == 4


@claim
async def leaving_early(transport: MPTransport) -> None:
    """Who is cancelled or out of time leaves alone; the client goes on."""
    client = transport.async_client()
    kept = [client.submit(row(value)) for value in range(10)]
    cancelled = [client.submit(row(99)) for _ in range(10)]
    for future in cancelled:
        future.cancel()
    with pytest.raises(TimeoutError, match="timeout=0"):
        await within(client(row(99), timeout=0.0))
    task = asyncio.ensure_future(client(row(99)))
    await asyncio.sleep(0)
    task.cancel()
    assert [action(answer) for answer in await within(asyncio.gather(*kept))] == list(
        range(0, 20, 2)
    )
    assert type((await outcomes(task))[0]) is asyncio.CancelledError
    assert action(await within(client(row(3), timeout=30.0, priority=5))) == 6


@claim
async def threads(transport: MPTransport) -> None:
    """Threads ask, one client for all or one for each, and submit."""
    shared = transport.sync_client()

    def act(number: int) -> None:
        own = transport.sync_client()
        for value in range(10):
            assert action(own(row(value))) == 2 * value
            assert action(shared(rows([number, value]))) == [2 * number, 2 * value]
        with pytest.raises(ModelError):
            own(row(-1))
        futures = [shared.submit(row(value)) for value in range(10)]
        assert [action(future.result(10)) for future in futures] == list(range(0, 20, 2))

    await all_well(*[InThread(act, number) for number in range(4)])


@claim
async def clients_that_are_closed(transport: MPTransport) -> None:
    """Closed clients leave, can still be used, and take nobody with them."""
    first, second = transport.async_client(), transport.async_client()
    assert action(await within(first(row(1)))) == 2
    assert action(await within(second(row(2)))) == 4
    first.close()
    assert action(await within(second(row(3)))) == 6
    assert action(await within(first(row(4)))) == 8


# -- in which processes -------------------------------------------------------


def check(said: Said, transport: MPTransport) -> dict[tuple[str, str], str | None]:
    """Check all claims on all loops; for each the traceback, if it does not hold."""
    torch.set_num_threads(1)
    said.hear()
    found: dict[tuple[str, str], str | None] = {}
    for loop, new_loop in LOOPS.items():
        for name, function in CLAIMS.items():
            try:
                with asyncio.Runner(loop_factory=new_loop) as runner:
                    runner.run(function(transport))
            except BaseException:
                found[loop, name] = traceback.format_exc()
            else:
                found[loop, name] = None
    client = transport.sync_client()
    assert action(client(row(1))) == 2
    said.say(found)
    said.hear()  # until the server is closed
    with pytest.raises(ServerClosedError):
        client(row(1))
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (place, method),
            id=f"{place}-{method}",
            # One worker asks for what is found, so that it is found once.
            marks=pytest.mark.xdist_group(f"{place}-{method}"),
        )
        for place in ("here", "apart")
        for method in ("fork", "spawn")
    ],
)
def found(request: pytest.FixtureRequest) -> dict[tuple[str, str], str | None]:
    """What a process has found: a server here or apart, a caller forked or spawned."""
    place, method = request.param
    transport = MPTransport(multiprocessing.get_context(method))
    kind: Any = InferenceServer if place == "here" else ProcessInferenceServer
    server = kind(policy() if place == "here" else policy, transport, max_batch_size=MAX_BATCH_SIZE)
    with Child(check, transport, method=method) as child:
        with server:
            child.pipe.send("serving")
            claims: dict[tuple[str, str], str | None] = child.hear(60)
        child.pipe.send("closed")
        child.hear()
    return claims


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", CLAIMS)
def test_from_afar(name: str, loop: str, found: dict[tuple[str, str], str | None]):
    """What the claim says holds in other processes, too."""
    if (failure := found[loop, name]) is not None:
        pytest.fail(f"{CLAIMS[name].__doc__}\n{failure}", pytrace=False)
