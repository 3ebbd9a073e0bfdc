"""Online RLHF on one page: three loops over one buffer.

roll_out   prompts -> admit -> generate -> score (rewards and reference at once) -> buffer
train      buffer -> batch -> learner step -> publish version -> load -> release slots -> record
evaluate   due versions, pinned -> downstream evaluations, on the same x-axis as the reward

roll_out   waits for a free slot      unblocked by train, which releases a batch once its weights serve
train      waits for B groups         unblocked by roll_out; and by evaluate, when two versions are queued
evaluate   waits for a due version    unblocked by train
"""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from trainers.batch import assemble
from trainers.buffer import Buffer, Take
from trainers.types import (
    DataError,
    Evaluation,
    Evaluator,
    Generator,
    Group,
    Learner,
    Prompt,
    Scorer,
    StepStats,
    Weights,
)

T = TypeVar("T")
Keep = Callable[[Group], bool]
QUEUED_EVALUATIONS = 2  # then training waits: no due version is dropped, none piles up


@dataclass(frozen=True, slots=True, kw_only=True)
class Actors:
    """Whom the loops talk to; Ray actors in a run, plain objects in a test."""

    generator: Generator
    scorers: Sequence[Scorer]
    learner: Learner
    evaluator: Evaluator


class Journal(Protocol):
    """Remembers: ledger, metrics, checkpoints. Decides which versions are evaluated and when to stop."""

    async def record(self, take: Take, stats: StepStats, weights: Weights) -> None:
        """Note one finished step; nothing of it is lost once this returns."""

    async def pin(self, weights: Weights) -> bool:
        """Whether this version is due for evaluation; keeps its weights if so."""

    async def evaluated(self, results: Sequence[Evaluation]) -> None:
        """Note the evaluations of one version."""

    def stopping(self) -> bool:
        """Whether the run was asked to end before its last step."""

    async def stopped(self) -> None:
        """Return once the run is asked to end."""

    async def suspend(self) -> None:
        """Save what the next incarnation needs to go on after the last recorded step."""


async def run(
    actors: Actors,
    prompts: Iterable[Prompt],
    buffer: Buffer,
    journal: Journal,
    *,
    start: Weights,
    steps: int,
    unfinished: Sequence[Weights] = (),
    keep: Keep = lambda _: True,
) -> None:
    """Train from `start` to version `steps`; return after the last evaluation, or soon after being asked to end.

    `unfinished` are pinned versions of an earlier incarnation that were never evaluated; a scored group that `keep`
    denies is replaced by one of the next prompt.
    """
    pinned: asyncio.Queue[Weights | None] = asyncio.Queue(QUEUED_EVALUATIONS)
    await actors.generator.load(start)
    async with asyncio.TaskGroup() as loops:
        rolling = loops.create_task(roll_out(prompts, actors.generator, actors.scorers, buffer, keep))
        evaluating = loops.create_task(evaluate(pinned, actors.evaluator, journal))
        for weights in [*unfinished, *([start] if await journal.pin(start) else [])]:
            await unless_stopped(journal, pinned.put(weights))
        await train(actors.learner, actors.generator, buffer, journal, pinned, version=start.version, steps=steps)
        rolling.cancel()
        if journal.stopping():
            await journal.suspend()
        await unless_stopped(journal, last_evaluation(pinned, evaluating))
        evaluating.cancel()  # if asked to end; what is pinned but not evaluated is evaluated after the resume


async def unless_stopped(journal: Journal, waiting: Coroutine[Any, Any, T]) -> T | None:
    """Await what may take long, but give it up and return None once the run is asked to end."""
    wait, stop = asyncio.ensure_future(waiting), asyncio.ensure_future(journal.stopped())
    try:
        await asyncio.wait((wait, stop), return_when=asyncio.FIRST_COMPLETED)
        return None if journal.stopping() else await wait
    finally:
        wait.cancel()
        stop.cancel()


async def roll_out(
    prompts: Iterable[Prompt], generator: Generator, scorers: Sequence[Scorer], buffer: Buffer, keep: Keep
) -> None:
    """Keep every slot of the buffer filled, in the order of `prompts`."""
    async with asyncio.TaskGroup() as in_flight:
        for prompt in prompts:
            ticket = await buffer.admit()
            in_flight.create_task(fill(ticket, prompt, generator, scorers, buffer, keep))


async def fill(
    ticket: int, prompt: Prompt, generator: Generator, scorers: Sequence[Scorer], buffer: Buffer, keep: Keep
) -> None:
    """Sample and score one group; a prompt that cannot be used is discarded, any other error ends the run."""
    try:
        group = await generator.generate(prompt)
        fields = await asyncio.gather(*(scorer.score(group) for scorer in scorers))
    except DataError as error:
        await buffer.discard(ticket, prompt, str(error))
        return
    rollouts = [
        dataclasses.replace(rollout, **{name: value for scores in of_rollout for name, value in scores.items()})
        for rollout, *of_rollout in zip(group.rollouts, *fields, strict=True)
    ]
    scored = Group(prompt=prompt, rollouts=tuple(rollouts))
    await (buffer.put(ticket, scored) if keep(scored) else buffer.replace(ticket, prompt))


async def train(
    learner: Learner,
    generator: Generator,
    buffer: Buffer,
    journal: Journal,
    pinned: asyncio.Queue[Weights | None],
    *,
    version: int,
    steps: int,
) -> None:
    """Take, learn, publish, load, release: once a step, until version `steps`."""
    while version < steps and (take := await unless_stopped(journal, buffer.take())):
        stats = await learner.step(assemble(take.groups, version))
        weights = await learner.publish()
        await generator.load(weights)
        await buffer.release(take.groups)
        await journal.record(take, stats, weights)
        if await journal.pin(weights):
            await unless_stopped(journal, pinned.put(weights))
        version = weights.version


async def evaluate(pinned: asyncio.Queue[Weights | None], evaluator: Evaluator, journal: Journal) -> None:
    """Evaluate each pinned version in turn; None ends the loop."""
    while (weights := await pinned.get()) is not None:
        await journal.evaluated(await evaluator.evaluate(weights))


async def last_evaluation(pinned: asyncio.Queue[Weights | None], evaluating: asyncio.Task[None]) -> None:
    """Return when everything pinned is evaluated."""
    await pinned.put(None)
    await asyncio.wait((evaluating,))
