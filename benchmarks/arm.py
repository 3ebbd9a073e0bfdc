"""One Headroom arm in a process of its own: a real run, or one of its stages alone; or just the prompts of a run.

python -m benchmarks.arm train|generator|learner|prompts OUT CONFIG [key=value …]
"""

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Coroutine
from itertools import islice
from pathlib import Path
from typing import Any

import ray

from cluster.cast import Cast, load_prompts, start_cast
from cluster.launch import connect, train
from cluster.placement import Placement
from configs.load import load
from configs.schema import Recipe
from trainers.batch import assemble
from trainers.spool import read, read_metrics
from trainers.types import Group

KEPT = (
    *("sync/seconds", "sync/logprob_gap", "time/step", "kl/reference"),
    *("rollout/length_mean", "rollout/discarded", "rollout/staleness_max", "rollout/staleness_mean"),
)
RECORDED = 4  # batches that the standalone learner replays in turn


def whole_run(recipe: Recipe) -> dict[str, Any]:
    """Run `cluster.launch.train` and return when its steps ended, its sync metrics and the engines' counts."""
    finished = train(recipe)
    records = read(finished.rundir.metrics)
    ends = [r["timestamp"] / 1000 for r in records if r["kind"] == "metric" and r["key"] == "time/step"]
    points = read_metrics(finished.rundir.metrics)
    metrics = {key: values for key, values in points.items() if key in KEPT or key.endswith("_busy")}
    engines = [dataclasses.asdict(stats) for stats in finished.engines.values()]
    return {"ends": ends, "metrics": metrics, "engines": engines}


async def generate_only(recipe: Recipe, cast: Cast) -> dict[str, Any]:
    """Generate into an infinite sink with as many groups in flight as a run's buffer has slots."""
    done: list[float] = []
    await generate(recipe, cast, recipe.run.steps * recipe.loop.batch_prompts, lambda _: done.append(time.time()))
    return {"ends": done[recipe.loop.batch_prompts - 1 :: recipe.loop.batch_prompts]}


async def learn_only(recipe: Recipe, cast: Cast) -> dict[str, Any]:
    """Train on recorded rollouts again and again, scored anew each time; the next batch is scored meanwhile."""
    size = recipe.loop.batch_prompts
    groups: list[Group] = []
    await generate(recipe, cast, RECORDED * size, groups.append)
    batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    ends: list[float] = []
    scoring = asyncio.create_task(score(batches[0], cast))
    for step in range(recipe.run.steps):
        scored = await scoring
        scoring = asyncio.create_task(score(batches[(step + 1) % RECORDED], cast))
        await cast.learner.step(assemble(scored, 0))
        ends.append(time.time())
    await scoring
    return {"ends": ends}


async def generate(recipe: Recipe, cast: Cast, count: int, sink: Callable[[Group], Any]) -> None:
    """Hand `count` groups to `sink` as they finish."""
    prompts = iter(cast.prompts)
    started = 0

    async def work() -> None:
        nonlocal started
        while started < count:
            started += 1
            sink(await cast.generator.generate(next(prompts)))

    slots = (recipe.loop.staleness + 1) * recipe.loop.batch_prompts
    async with asyncio.TaskGroup() as workers:
        for _ in range(slots):
            workers.create_task(work())


async def score(groups: list[Group], cast: Cast) -> list[Group]:
    """Ask every scorer about every group, as the loop does."""

    async def one(group: Group) -> Group:
        fields = await asyncio.gather(*(scorer.score(group) for scorer in cast.scorers))
        rollouts = [
            dataclasses.replace(rollout, **{name: value for found in of_rollout for name, value in found.items()})
            for rollout, *of_rollout in zip(group.rollouts, *fields, strict=True)
        ]
        return Group(prompt=group.prompt, rollouts=tuple(rollouts))

    return await asyncio.gather(*map(one, groups))


def stage(recipe: Recipe, body: Callable[[Recipe, Cast], Coroutine[Any, Any, dict[str, Any]]]) -> dict[str, Any]:
    """Start the run's whole cast on its seats and let only one stage work."""

    async def with_cast() -> dict[str, Any]:
        placement = Placement(recipe)
        await placement.ready()
        cast = await start_cast(recipe, placement, 0)
        try:
            await cast.generator.load(await cast.learner.stored())
            return await body(recipe, cast)
        finally:
            await cast.close()

    connect(recipe)
    try:
        return asyncio.run(with_cast())
    finally:
        ray.shutdown()


def prompts_of(recipe: Recipe) -> dict[str, Any]:
    """Return the prompts that a run of this recipe admits, in order, and how many tokens they have together."""
    prompts = list(islice(load_prompts(recipe), recipe.run.steps * recipe.loop.batch_prompts))
    return {
        "prompts": [list(prompt.messages) for prompt in prompts],
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
    }


if __name__ == "__main__":
    mode, out, config, *overrides = sys.argv[1:]
    chosen = load(config, overrides)
    whole, stages = {"train": whole_run, "prompts": prompts_of}, {"generator": generate_only, "learner": learn_only}
    found = whole[mode](chosen) if mode in whole else stage(chosen, stages[mode])
    Path(out).write_text(json.dumps(found))
