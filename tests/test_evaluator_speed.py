"""Evaluations never block training: the real loops on plain objects, by a clock that jumps to whatever is due next."""

import asyncio
import itertools
import selectors
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.test_buffer import World, prompt
from trainers.buffer import Buffer, Take
from trainers.online import QUEUED_EVALUATIONS, Actors, run
from trainers.types import Batch, Evaluation, Group, Prompt, StepStats, Weights

STEP_S = 1.0
EVALUATION_S = 20 * STEP_S


class Jumping(selectors.SelectSelector):
    """Sleeps take no time: the clock moves on by what the loop would have waited."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits for something that nobody does")
        self.now += max(timeout, 0)
        return super().select(0)


class Clocked(asyncio.SelectorEventLoop):
    """An event loop on that clock."""

    def __init__(self) -> None:
        self._clock = Jumping()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


class Timed(World):
    """Generation is faster than a step, so that training sets the pace; an evaluation takes `evaluation_s`."""

    def __init__(self, *, every: int, evaluation_s: float) -> None:
        super().__init__(seed=0, straggler=0, failing=0, every=every)
        self.evaluation_s = evaluation_s
        self.recorded = [0.0]
        self.queued = 0  # due versions that are not evaluated yet, the one being evaluated included
        self.most_queued = 0

    async def pause(self) -> None:
        await asyncio.sleep(STEP_S / 10)

    async def generate(self, prompt: Prompt) -> Group:
        await asyncio.sleep(STEP_S / 10 * (1 + prompt.position % 3))
        return await super().generate(prompt)

    async def step(self, batch: Batch) -> StepStats:
        await asyncio.sleep(STEP_S)
        return await super().step(batch)

    async def pin(self, weights: Weights) -> bool:
        due = await super().pin(weights)
        self.queued += due
        self.most_queued = max(self.most_queued, self.queued)
        return due

    async def evaluate(self, weights: Weights) -> Sequence[Evaluation]:
        await asyncio.sleep(self.evaluation_s)
        self.queued -= 1
        return [Evaluation(version=weights.version, task="t", prompt_uids=(), scores={}, samples=())]

    async def record(self, take: Take, stats: StepStats, weights: Weights) -> None:
        await super().record(take, stats, weights)
        self.recorded.append(asyncio.get_running_loop().time())


def step_times(world: Timed, steps: int) -> Any:
    """Return the seconds (steps,) from record to record of a run."""

    async def main() -> None:
        actors = Actors(generator=world, scorers=[world], learner=world, evaluator=world)
        buffer = Buffer(batch=2, staleness=1, wanted=steps * 2)
        start = Weights(version=0, hash="", handle=None)
        await run(actors, map(prompt, itertools.count()), buffer, world, start=start, steps=steps)

    with asyncio.Runner(loop_factory=Clocked) as runner:
        runner.run(main())
    assert world.evaluations == [version for version in range(steps + 1) if version % world.every == 0]
    return np.diff(world.recorded)


@pytest.mark.parametrize("every", [10, 12, 15])
def test_an_evaluator_twenty_times_slower_than_a_step_costs_training_nothing(every: int) -> None:
    steps = 30  # at most versions 0, 10, 20 and 30: one is evaluated, and no more than the queue holds wait
    slow, fast = Timed(every=every, evaluation_s=EVALUATION_S), Timed(every=every, evaluation_s=0.0)
    times, unhindered = step_times(slow, steps), step_times(fast, steps)
    assert slow.most_queued <= 1 + QUEUED_EVALUATIONS and fast.most_queued == 1
    assert np.all(unhindered >= STEP_S)
    assert np.max(np.abs(times / unhindered - 1)) < 0.05


def test_the_clock_sees_that_training_waits_for_a_full_queue() -> None:
    world = Timed(every=1, evaluation_s=EVALUATION_S)
    times = step_times(world, 30)
    assert np.all(times[1:3] < 2 * STEP_S) and np.median(times[3:]) == pytest.approx(EVALUATION_S)
