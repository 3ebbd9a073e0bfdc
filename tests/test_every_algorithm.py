"""`configs/quickstart.yaml algorithm=NAME` for every name in the table: 2 real steps each, on one vLLM engine."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engine import EngineOptions, sampling_of
from actors.reference import ReferenceActor
from actors.vllm_engine import Engine
from actors.weight_sync import Mailbox, load_weights, pack
from configs.load import load
from configs.schema import Recipe
from tests.tiny import tiny_model, tiny_tokenizer
from trainers.algorithms import ALGORITHMS
from trainers.batch import informative
from trainers.buffer import Buffer, Take
from trainers.critic import Critic
from trainers.learner import Learner
from trainers.online import Actors, run
from trainers.types import Batch, Evaluation, Group, Prompt, StepStats, Weights

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
STEPS = 2


class Loop:
    """What the three loops talk to, in this process: a real engine and learner, a rule as reward, no evaluation."""

    def __init__(self, recipe: Recipe, engine: Engine, mailbox: Mailbox) -> None:
        self.engine, self.mailbox = engine, mailbox
        self.sampling = sampling_of(recipe.sampling, greedy=ALGORITHMS[recipe.algorithm.name].needs_greedy)
        self.learner = Learner(recipe, total_steps=STEPS)
        self.critic = Critic(recipe) if ALGORITHMS[recipe.algorithm.name].needs_critic else None
        self.version = engine.version + 1
        self.recorded: list[tuple[Take, StepStats]] = []

    async def generate(self, prompt: Prompt) -> Group:
        return await self.engine.generate(prompt, self.sampling)

    async def load(self, weights: Weights) -> None:
        await load_weights(self.engine, weights, self.mailbox)

    async def score(self, group: Group) -> Sequence[Mapping[str, Any]]:
        return [{"rewards": {}, "reward": float(len(set(rollout.text)))} for rollout in group.rollouts]

    async def step(self, batch: Batch) -> StepStats:
        values = None if self.critic is None else self.critic.values(batch)
        stats = self.learner.step(batch, values)
        if self.critic is not None and values is not None:
            self.critic.step(batch, values)
        return stats

    async def publish(self) -> Weights:
        self.version += 1
        return self.weights()

    def weights(self) -> Weights:
        buffer, sha256 = pack(self.learner.state_dict_for_publish())
        return Weights(version=self.version, hash=sha256, handle=buffer)

    async def evaluate(self, weights: Weights) -> Sequence[Evaluation]:
        return ()

    async def record(self, take: Take, stats: StepStats, weights: Weights) -> None:
        self.recorded.append((take, stats))

    async def pin(self, weights: Weights) -> bool:
        return False

    async def evaluated(self, results: Sequence[Evaluation]) -> None:
        """Never asked."""

    def stopping(self) -> bool:
        return False

    async def stopped(self) -> None:
        await asyncio.Event().wait()

    async def suspend(self) -> None:
        """Never asked."""


@asynccontextmanager
async def serving(policy: Path) -> AsyncIterator[tuple[Engine, Mailbox]]:
    options = EngineOptions(
        model_path=str(policy), run=str(policy), dtype="float32", max_length=128, kv_cache_gb=0.1, threads=1
    )
    engine, mailbox = Engine(options), Mailbox(options.run)
    await engine.start()
    try:
        yield engine, mailbox
    finally:
        engine.close()
        mailbox.close()


def recipe(name: str, policy: Path) -> Recipe:
    small = ["sampling.n=4", "sampling.max_tokens=12", "loop.batch_prompts=3", f"model.path={policy}"]
    return load(QUICKSTART, [f"algorithm={name}", *small])


def prompts() -> Iterator[Prompt]:
    tokenizer = tiny_tokenizer()
    for position in itertools.count():
        ids = np.array(tokenizer(f"question {position}")["input_ids"], np.int32)
        yield Prompt(uid=f"e0-p{position}", position=position, messages=(), token_ids=ids)


async def play(recipe: Recipe, engine: Engine, mailbox: Mailbox, reference: ReferenceActor) -> Loop:
    """Run the loop for `STEPS` steps from the versions that the engine has served to others."""
    loop = Loop(recipe, engine, mailbox)
    scorers = [loop] if recipe.algorithm.kl.where == "none" else [loop, reference]
    batch, staleness = recipe.loop.batch_prompts, recipe.loop.staleness
    await run(
        Actors(generator=loop, scorers=scorers, learner=loop, evaluator=loop),
        prompts(),
        Buffer(batch=batch, staleness=staleness, wanted=STEPS * batch),
        loop,
        start=loop.weights(),
        steps=loop.version + STEPS,
        keep=informative if recipe.algorithm.informative_groups else lambda _: True,
    )
    return loop


@pytest.mark.slow
def test_every_algorithm_takes_two_real_steps(tmp_path: Path) -> None:
    tiny_model(tmp_path, tied=True, max_length=128)

    async def main() -> dict[str, Loop]:
        first = recipe("grpo", tmp_path)
        reference = ReferenceActor(str(tmp_path), first.reference, "float32", first.sampling.temperature)
        async with serving(tmp_path) as (engine, mailbox):
            return {name: await play(recipe(name, tmp_path), engine, mailbox, reference) for name in ALGORITHMS}

    for name, loop in asyncio.run(main()).items():
        assert len(loop.recorded) == STEPS, name
        for take, stats in loop.recorded:
            assert np.isfinite(stats.loss) and stats.grad_norm > 0, name
            assert stats.metrics.get("rollout/behaviour_gap", 0.0) < 1e-4, name
            greedy = [rollout for group in take.groups for rollout in group.rollouts if rollout.greedy]
            assert len(greedy) == (len(take.groups) if name == "remax" else 0), name
            assert all(len(group.sampled) == 4 for group in take.groups)
            assert name != "dapo" or all(map(informative, take.groups))
