"""Replacement of dead generator replicas, on plain objects."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import replicas
from cluster.replicas import Replicas
from trainers.types import InfraError, Weights


class Engine:
    """A generator actor and what its `handle` looks like from here; `die` makes everything it is asked fail."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.version = -1
        self.answered: list[int] = []  # the version of each answer
        self.dead = asyncio.Event()
        self.hold: asyncio.Event | None = None  # requests wait for it
        self.fail: list[InfraError] = []  # raised by the next requests, although alive

    @property
    def handle(self) -> Any:
        """Return the handle; like Ray's it is another object each time."""
        methods = ("generate", "load", "check", "probe")
        return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(self, name)) for name in methods})

    def die(self) -> None:
        self.dead.set()

    async def generate(self, *_: Any) -> str:
        if self.fail:
            raise self.fail.pop()
        if self.hold:
            waits = [asyncio.ensure_future(event.wait()) for event in (self.hold, self.dead)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        await self.check()
        self.answered.append(self.version)
        return self.name

    async def load(self, weights: Weights, *_: Any) -> None:
        await self.check()
        await asyncio.sleep(0)
        self.version = weights.version

    async def probe(self) -> int:
        await self.check()
        return self.version

    async def check(self) -> int:
        if self.dead.is_set():
            raise InfraError(f"{self.name}: vLLM's engine process died")
        return self.version


def weights(version: int) -> Weights:
    return Weights(version=version, hash="", handle=None)


def pool(engines: list[Engine], rehire: Callable[[str], Any], **settings: Any) -> Replicas:
    named = {engine.name: engine.handle for engine in engines}
    return Replicas(named, rehire, **({"deadline_s": 5, "retries": 0, "max_restarts": 2} | settings))


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BACK_OFF_S", 0.0)


def ask(group: Replicas, count: int) -> "asyncio.Future[list[Any]]":
    return asyncio.gather(*(group.request("generate", what="generating") for _ in range(count)))


def test_requests_of_a_dead_replica_move_and_its_replacement_serves() -> None:
    async def main() -> None:
        a, b, new = Engine("a"), Engine("b"), Engine("new")
        up = asyncio.Event()

        async def rehire(name: str) -> Any:
            assert name == "a"
            await up.wait()
            return new.handle

        group = pool([a, b], rehire)
        await group.load(weights(0))
        a.hold = asyncio.Event()
        asked = ask(group, 6)
        await asyncio.sleep(0.01)
        a.die()
        assert await asked == ["b"] * 6  # 3 of them began on a
        await group.load(weights(1))  # does not wait for the replacement
        assert (b.version, new.version, group.restarts) == (1, -1, 1)
        up.set()
        while "new" not in await ask(group, 2):
            pass
        assert set(new.answered) == {1}
        assert sorted(await group.probe("probe")) == [1, 1]

    asyncio.run(main())


def test_with_no_replica_left_everything_waits_for_the_replacement() -> None:
    async def main() -> None:
        a, new = Engine("a"), Engine("new")

        async def rehire(_: str) -> Any:
            return new.handle

        group = pool([a], rehire)
        await group.load(weights(0))
        a.die()
        assert await ask(group, 3) == ["new"] * 3 and group.restarts == 1
        new.die()
        await group.load(weights(1))  # the load itself finds it dead; the second replacement is dead at birth
        assert await group.probe("probe")

    with pytest.raises(InfraError, match=r"^a died and generator.max_restarts is 2; .*engine process died$"):
        asyncio.run(main())


def test_a_load_that_comes_while_a_replacement_catches_up_is_not_missed() -> None:
    async def main() -> None:
        a, b = Engine("a"), Engine("b")
        loading, go_on = asyncio.Event(), asyncio.Event()

        class Slow(Engine):
            async def load(self, weights: Weights, *_: Any) -> None:
                loading.set()
                await go_on.wait()
                await super().load(weights)

        new = Slow("new")

        async def rehire(_: str) -> Any:
            return new.handle

        group = pool([a, b], rehire)
        await group.load(weights(3))
        a.die()
        await ask(group, 2)
        await loading.wait()
        await group.load(weights(4))
        go_on.set()
        while not new.answered:
            await ask(group, 2)
        assert set(new.answered) == {4}

    asyncio.run(main())


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_a_replica_that_cannot_be_replaced_ends_the_run_in_one_line(max_restarts: int) -> None:
    tried: list[str] = []

    async def rehire(name: str) -> Any:
        tried.append(name)
        raise InfraError("not up after 300 s: a")

    async def main() -> None:
        a, b = Engine("a"), Engine("b")
        group = pool([a, b], rehire, max_restarts=max_restarts)
        await group.load(weights(0))
        a.die()
        while True:  # b serves for as long as there is hope
            assert set(await ask(group, 2)) == {"b"}

    with pytest.raises(InfraError, match=f"^a died and generator.max_restarts is {max_restarts}; ") as ended:
        asyncio.run(main())
    assert tried == ["a"] * max_restarts and "\n" not in str(ended.value)


def test_a_failure_of_a_living_replica_counts_against_the_retries() -> None:
    async def rehire(_: str) -> Any:
        raise AssertionError("it is alive")

    async def main() -> None:
        a, b = Engine("a"), Engine("b")
        group = pool([a, b], rehire, retries=2)
        await group.load(weights(0))
        a.fail = [InfraError("aborted")]
        assert await ask(group, 1) == ["b"]
        a.fail, b.fail = [InfraError("aborted")] * 3, [InfraError("aborted")] * 3
        with pytest.raises(InfraError, match="aborted"):
            await ask(group, 1)
        assert len(a.fail) + len(b.fail) == 3 and group.restarts == 0

    asyncio.run(main())
