"""The fan-out on plain objects: which replica is asked, and what errors become."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster import group
from cluster.group import LearnerGroup, LeastLoaded, call
from cluster.placement import all_ready
from configs.errors import UserError
from trainers.types import DataError, InfraError, StepStats


def replica(answer: Callable[[], Awaitable[Any]]) -> Any:
    """Return what a handle of an actor with a method `ask` looks like from here."""
    return SimpleNamespace(ask=SimpleNamespace(remote=answer))


def raising(error: Exception) -> Callable[[], Awaitable[Any]]:
    async def answer() -> Any:
        raise error

    return answer


def remote(error: Exception) -> Exception:
    """Return `error` as Ray hands it over from an actor."""
    return RayTaskError("ask", "Traceback …", error).as_instanceof_cause()


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "BACK_OFF_S", 0.0)


def test_requests_spread_over_the_replicas() -> None:
    asked = [0, 0, 0]
    hold = asyncio.Event()

    def counting(index: int) -> Callable[[], Awaitable[None]]:
        async def answer() -> None:
            asked[index] += 1
            await hold.wait()

        return answer

    async def main() -> None:
        pool = LeastLoaded([replica(counting(index)) for index in range(3)])
        requests = [asyncio.create_task(pool.request("ask", what="asking", deadline_s=5)) for _ in range(9)]
        await asyncio.sleep(0.01)
        hold.set()
        await asyncio.gather(*requests)

    asyncio.run(main())
    assert asked == [3, 3, 3]


def test_a_retry_goes_to_another_replica_than_the_dead_one() -> None:
    async def alive() -> str:
        await asyncio.sleep(0.01)  # busy, so that the dead one always has the smaller load
        return "answer"

    async def main() -> list[str]:
        pool = LeastLoaded([replica(raising(remote(InfraError("engine died")))), replica(alive)])
        return await asyncio.gather(*(pool.request("ask", what="asking", deadline_s=5, retries=1) for _ in range(8)))

    assert asyncio.run(main()) == ["answer"] * 8


def test_retries_end_with_the_last_error() -> None:
    pool = LeastLoaded([replica(raising(remote(InfraError("engine died"))))])
    with pytest.raises(InfraError, match="engine died"):
        asyncio.run(pool.request("ask", what="asking", deadline_s=5, retries=2))


@pytest.mark.parametrize("error", [UserError("a"), DataError("b"), InfraError("c"), ValueError("d")])
def test_an_actors_own_error_arrives_as_it_was(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as caught:
        asyncio.run(call(raising(remote(error))(), "asking", 5))
    assert type(caught.value) is type(error)


def test_a_deadline_and_a_dead_actor_are_infrastructure() -> None:
    with pytest.raises(InfraError, match=r"asking: no answer after 0.01 s"):
        asyncio.run(call(asyncio.sleep(5), "asking", 0.01))
    with pytest.raises(InfraError, match="asking: The actor died unexpectedly"):
        asyncio.run(call(raising(ActorDiedError())(), "asking", 5))


@pytest.mark.parametrize(
    ("last_line", "kind", "says"),
    [
        (
            "configs.errors.UserError: reward model rm: it has 2 outputs",
            UserError,
            "^reward model rm: it has 2 outputs$",
        ),
        ("RuntimeError: out of memory", InfraError, "^starting reward-0: RuntimeError: out of memory$"),
    ],
)
def test_what_a_constructor_raises_is_one_line(last_line: str, kind: type[Exception], says: str) -> None:
    died = ActorDiedError(
        RayTaskError("__init__", f"Traceback (most recent call last):\n  …\n{last_line}", Exception())
    )
    assert died.actor_init_failed
    with pytest.raises(kind, match=says):
        asyncio.run(all_ready({"reward-0": raising(died)()}, 5))


@pytest.mark.parametrize("turns", range(8))
def test_a_raise_comes_between_the_same_steps_on_every_rank(turns: int) -> None:
    """However many turns of the loop lie between them."""
    calls: dict[str, list[str]] = {name: [] for name in ("policy-0", "policy-1", "critic-0")}
    stats = StepStats(loss=0, grad_norm=0, metrics={}, rng_hash="")
    answers = {"values": 0.0, "step": stats, "raise_kl": True}

    def handle(name: str) -> Any:
        def remote(method: str) -> Any:
            async def answer() -> Any:
                await asyncio.sleep(0)
                return {} if (method, name) == ("step", "critic-0") else answers[method]

            def called(*_: Any) -> Awaitable[Any]:
                calls[name].append(method)  # in this order an actor does them
                return answer()

            return SimpleNamespace(remote=called)

        return SimpleNamespace(**{method: remote(method) for method in answers})

    async def main() -> None:
        learner = LearnerGroup(
            [handle("policy-0"), handle("policy-1")],
            [handle("critic-0")],
            version=0,
            transport="object_store",
            deadline_s=5,
        )

        batch: Any = SimpleNamespace()  # nobody reads it

        async def train() -> None:
            for _ in range(3):
                await learner.step(batch)

        training = asyncio.create_task(train())
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await learner.raise_kl(4.0, 8, 0)
        await training

    asyncio.run(main())
    before = {name: made[: made.index("raise_kl")].count("step") for name, made in calls.items()}
    assert len(set(before.values())) == 1 and all(made.count("step") == 3 for made in calls.values()), calls
