"""`configs/quickstart.yaml algorithm=NAME` for every name in the table: 2 real steps each, on one vLLM engine."""

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.solo import FullBuffer, Solo, play, stage
from configs.load import load
from configs.schema import Recipe
from tests.tiny import tiny_model
from trainers.algorithms import ALGORITHMS
from trainers.batch import assemble, informative
from trainers.online import roll_out
from trainers.types import DataError, Group, Prompt, Rollout, VersionSpan, Weights

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
STEPS, STALE_STEPS = 2, 5


class Characters:
    """A rule as reward: how many different characters a completion has."""

    async def score(self, group: Group) -> Sequence[Mapping[str, Any]]:
        return [{"rewards": {}, "reward": float(len(set(rollout.text)))} for rollout in group.rollouts]


def recipe(name: str, directory: Path, *changes: str) -> Recipe:
    small = ["sampling.n=4", "sampling.max_tokens=12", "loop.batch_prompts=3", f"run.steps={STEPS}"]
    places = [f"model.path={directory}", f"data.path={directory / 'prompts.jsonl'}"]
    rule = ["reward.components=[{name: rule, function: 'actors.rules:distinct'}]"]  # of the stage, which gets another
    return load(QUICKSTART, [f"algorithm={name}", *small, *places, *rule, *changes])


async def play_all(directory: Path) -> tuple[dict[str, Solo], dict[int, Solo]]:
    """Return a run of each algorithm, and runs of `grpo` by staleness."""
    async with stage(recipe("grpo", directory), str(directory)) as on:
        on = dataclasses.replace(on, reward=Characters())
        every = {name: await play(recipe(name, directory), on) for name in ALGORITHMS}
        steps = f"run.steps={STALE_STEPS}"
        return every, {
            bound: await play(recipe("grpo", directory, steps, f"loop.staleness={bound}"), on) for bound in (0, 2)
        }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Solo], dict[int, Solo]]:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_model(directory, tied=True, max_length=128)
    rows = [{"prompt": f"question {number}"} for number in range(40)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return asyncio.run(play_all(directory))


@pytest.mark.slow
def test_every_algorithm_takes_two_real_steps(played: tuple[dict[str, Solo], dict[int, Solo]]) -> None:
    assert played[0].keys() == ALGORITHMS.keys()
    for name, solo in played[0].items():
        assert len(solo.recorded) == STEPS, name
        for take, stats in solo.recorded:
            assert np.isfinite(stats.loss) and stats.grad_norm > 0, name
            assert stats.metrics.get("rollout/behaviour_gap", 0.0) < 1e-4, name
            greedy = [rollout for group in take.groups for rollout in group.rollouts if rollout.greedy]
            assert len(greedy) == (len(take.groups) if name == "remax" else 0), name
            assert all(len(group.sampled) == 4 for group in take.groups)
            assert name != "dapo" or all(map(informative, take.groups))


@pytest.mark.slow
def test_in_lockstep_rollouts_are_as_old_as_the_bound_allows(
    played: tuple[dict[str, Solo], dict[int, Solo]],
) -> None:
    for bound, solo in played[1].items():
        batches = [assemble(take.groups, 0) for take, _ in solo.recorded]
        versions = [np.unique(batch.token_versions[batch.mask]) for batch in batches]
        expected = [max(step - bound, 0) for step in range(STALE_STEPS)]
        assert [list(found - solo.first) for found in versions] == [[version] for version in expected]
        published: Weights = solo.weights()
        assert published.version == solo.first + STALE_STEPS


async def lockstep(seed: int, bound: int, batch: int, steps: int) -> list[list[int]]:
    """Return the versions of each batch where generation takes random time, fails, and gives groups of no use."""
    rng, version, found = np.random.default_rng(seed), 0, []
    ids = np.zeros(1, np.int32)

    class Sampler:
        async def generate(self, prompt: Prompt) -> Group:
            begun = version
            for _ in range(rng.integers(6)):
                await asyncio.sleep(0)
            if rng.random() < 0.2:
                raise DataError("no answer")
            spans = (VersionSpan(start=0, stop=1, version=begun), VersionSpan(start=1, stop=1, version=version))
            answer = Rollout(
                uid="",
                seed=0,
                token_ids=ids,
                logprobs=np.zeros(1, np.float32),
                spans=spans,
                finish_reason="stop",
                text="",
            )
            return Group(prompt=prompt, rollouts=(answer,))

        async def load(self, weights: Weights) -> None:
            """Never called."""

    prompts = (Prompt(uid=f"p{i}", position=i, messages=(), token_ids=ids) for i in itertools.count())
    buffer = FullBuffer(batch=batch, staleness=bound, wanted=steps * batch)
    async with asyncio.TaskGroup() as tasks:
        rolling = tasks.create_task(roll_out(prompts, Sampler(), (), buffer, lambda _: rng.random() < 0.8))
        for _ in range(steps):
            take = await buffer.take()
            await buffer.full()
            found.append(sorted({span.version for group in take.groups for span in group.rollouts[0].spans}))
            version += 1
            await buffer.release(take.groups)
        rolling.cancel()
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 4), st.integers(1, 4), st.integers(1, 8))
def test_lockstep_holds_whatever_generation_does(seed: int, bound: int, batch: int, steps: int) -> None:
    found = asyncio.run(asyncio.wait_for(lockstep(seed, bound, batch, steps), 30))
    assert found == [[max(step - bound, 0)] for step in range(steps)]
