"""The staleness bound, the order and the exactly-once property, on plain objects with random latencies."""

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from trainers.buffer import Buffer, Take
from trainers.online import Actors, run
from trainers.types import (
    Batch,
    DataError,
    Evaluation,
    Group,
    InfraError,
    Prompt,
    Rollout,
    StepStats,
    VersionSpan,
    Weights,
)

TIMEOUT = 20


def prompt(position: int) -> Prompt:
    return Prompt(uid=f"e0-p{position}", position=position, messages=(), token_ids=np.zeros(1, np.int32))


class World:
    """Generator, scorer, learner, evaluator and journal in one, each as slow as a random number says."""

    def __init__(self, *, seed: int, straggler: float, failing: float, dull: float = 0, every: int = 3) -> None:
        self.random = random.Random(seed)
        self.straggler, self.failing, self.dull, self.every = straggler, failing, dull, every
        self.serving = -1
        self.version = 0
        self.batches: list[Batch] = []
        self.takes: list[Take] = []
        self.generated: list[str] = []
        self.evaluations: list[int] = []
        self.halt = asyncio.Event()
        self.suspended_after: int | None = None

    async def pause(self) -> None:
        """Let a random number of other events happen first: a latency without a clock."""
        turns = self.random.randrange(4) if self.random.random() > self.straggler else 200
        for _ in range(turns):
            await asyncio.sleep(0)

    async def generate(self, prompt: Prompt) -> Group:
        self.generated.append(prompt.uid)
        oldest = self.serving
        await self.pause()
        spans = [VersionSpan(start=0, stop=1, version=oldest), VersionSpan(start=1, stop=2, version=self.serving)]
        if self.random.random() < self.failing:
            raise DataError("this prompt is unusable")
        rollout = Rollout(
            uid=f"{prompt.uid}-s0",
            seed=0,
            token_ids=np.zeros(2, np.int32),
            logprobs=np.zeros(2, np.float32),
            spans=tuple(spans),
            finish_reason="stop",
            text="",
        )
        return Group(prompt=prompt, rollouts=(rollout,))

    async def score(self, group: Group) -> Sequence[dict[str, float]]:
        await self.pause()
        return [{"reward": float(self.random.random() >= self.dull)} for _ in group.rollouts]

    def keep(self, group: Group) -> bool:
        return group.rollouts[0].reward > 0

    async def load(self, weights: Weights) -> None:
        await self.pause()
        self.serving = weights.version

    async def step(self, batch: Batch) -> StepStats:
        await self.pause()
        self.batches.append(batch)
        return StepStats(loss=0, grad_norm=0, metrics={}, rng_hash="")

    async def publish(self) -> Weights:
        self.version += 1
        return Weights(version=self.version, hash="", handle=None)

    async def evaluate(self, weights: Weights) -> Sequence[Evaluation]:
        await self.pause()
        return [Evaluation(version=weights.version, task="t", prompt_uids=(), scores={}, samples=())]

    async def record(self, take: Take, stats: StepStats, weights: Weights) -> None:
        self.takes.append(take)

    async def pin(self, weights: Weights) -> bool:
        return weights.version % self.every == 0

    async def evaluated(self, results: Sequence[Evaluation]) -> None:
        self.evaluations += [result.version for result in results]

    def stopping(self) -> bool:
        return self.halt.is_set()

    async def stopped(self) -> None:
        await self.halt.wait()

    async def suspend(self) -> None:
        self.suspended_after = len(self.takes)


def play(world: World, *, batch: int, staleness: int, steps: int) -> None:
    async def main() -> None:
        actors = Actors(generator=world, scorers=[world], learner=world, evaluator=world)
        buffer = Buffer(batch=batch, staleness=staleness, wanted=steps * batch)
        start = Weights(version=0, hash="", handle=None)
        prompts = map(prompt, itertools.count())
        await run(actors, prompts, buffer, world, start=start, steps=steps, keep=world.keep)

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


@pytest.mark.parametrize("staleness", [0, 1, 4])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    straggler=st.sampled_from([0, 0.03, 0.3]),
    failing=st.sampled_from([0, 0.02, 0.2]),
    dull=st.sampled_from([0, 0.5, 0.9]),
)
def test_staleness_order_and_exactly_once(
    staleness: int, seed: int, batch: int, straggler: float, failing: float, dull: float
) -> None:
    steps = 12
    world = World(seed=seed, straggler=straggler, failing=failing, dull=dull)
    # The budget's allowance is not what is tested here, so failures stay below it.
    world.failing = failing if failing * steps * batch < 4 else 0
    play(world, batch=batch, staleness=staleness, steps=steps)

    ages = [step - int(versions.min()) for step, b in enumerate(world.batches) for versions in b.token_versions]
    assert max(ages) <= staleness and min(ages) >= 0
    trained = [group.prompt.position for take in world.takes for group in take.groups]
    assert trained == sorted(trained)
    retired = sorted(trained + [d.prompt.position for take in world.takes for d in take.discarded])
    assert retired == list(range(len(retired))), "every prompt up to the last one exactly once"
    assert all(world.keep(group) for take in world.takes for group in take.groups)
    assert (dull > 0.8) <= any(gone.uninformative for take in world.takes for gone in take.discarded)
    assert len(trained) == steps * batch
    assert world.evaluations == [v for v in range(steps + 1) if v % world.every == 0]


@pytest.mark.parametrize("staleness", [1, 4])
def test_the_bound_is_reached(staleness: int) -> None:
    world = World(seed=0, straggler=0, failing=0)
    play(world, batch=2, staleness=staleness, steps=20)
    ages = [step - int(versions.min()) for step, b in enumerate(world.batches) for versions in b.token_versions]
    assert max(ages) == staleness, "a bound that is never reached would not be exact"


def test_nothing_is_generated_that_nobody_trains_on() -> None:
    world = World(seed=0, straggler=0.1, failing=0)
    play(world, batch=3, staleness=4, steps=4)
    assert len(world.generated) == 12


def test_a_failing_actor_ends_the_run() -> None:
    class Broken(World):
        async def score(self, group: Group) -> Sequence[dict[str, float]]:
            raise InfraError("reward actor is gone")

    world = Broken(seed=0, straggler=0, failing=0)
    with pytest.raises(ExceptionGroup) as caught:
        play(world, batch=2, staleness=1, steps=3)
    assert caught.value.subgroup(InfraError) is not None


@pytest.mark.parametrize(("stuck", "every", "after"), [("generate", 3, 2), ("evaluate", 1, 1), ("evaluate", 20, 20)])
def test_a_run_asked_to_end_waits_for_nothing_but_the_current_step(stuck: str, every: int, after: int) -> None:
    world, steps = World(seed=0, straggler=0, failing=0, every=every), 20
    usual = getattr(world, stuck)

    async def hanging(argument: Any) -> Any:
        if len(world.takes) < after:
            return await usual(argument)
        asyncio.get_running_loop().call_later(0.02, world.halt.set)  # by then every loop waits for this one
        return await asyncio.Event().wait()

    setattr(world, stuck, hanging)
    play(world, batch=2, staleness=1, steps=steps)
    assert len(world.takes) == len(world.batches) == world.version, "a step that was begun is recorded"
    assert (len(world.takes) == steps) == (after == steps)
    assert world.suspended_after == (None if after == steps else len(world.takes))


def test_too_many_discards_end_the_run() -> None:
    async def main() -> None:
        buffer = Buffer(batch=1, staleness=0, wanted=100, discard_budget=0.1)
        for position in itertools.count():
            await buffer.discard(await buffer.admit(), prompt(position), "bad")

    with pytest.raises(UserError, match=r"9 of 9 prompts were discarded.*loop\.discard_budget.*e0-p8: bad"):
        asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_too_many_uninformative_groups_end_the_run_but_not_at_its_start() -> None:
    async def main() -> None:
        buffer = Buffer(batch=2, staleness=0, wanted=1000, refill_budget=0.5)
        for position in itertools.count():
            await buffer.replace(await buffer.admit(), prompt(position))

    with pytest.raises(UserError, match=r"21 of 21 groups had equal rewards.*algorithm\.refill_budget=0\.5"):
        asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_a_ticket_is_filled_once() -> None:
    async def main() -> None:
        buffer = Buffer(batch=1, staleness=0, wanted=2)
        ticket = await buffer.admit()
        group = Group(prompt=prompt(0), rollouts=())
        await buffer.put(ticket, group)
        with pytest.raises(KeyError):
            await buffer.put(ticket, dataclasses.replace(group))

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))
