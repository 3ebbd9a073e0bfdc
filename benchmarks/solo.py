"""The loop of `headroom train` in one process and in lockstep: real engine, learner, reward model, reference; no Ray.

Runs share what takes longest to start. Lockstep: no step begins before every slot of the buffer holds a scored group.
So rollouts are as old as `loop.staleness` allows from the first step that can be, whatever the machine does meanwhile,
and none spans versions: what a bound costs at worst.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from actors.reference import ReferenceActor
from actors.reward import RewardActor
from actors.vllm_engine import Engine
from actors.weight_sync import Mailbox, load_weights, pack
from cluster.cast import engine_options, load_prompts, training_sampling
from configs.schema import Recipe
from trainers.algorithms import ALGORITHMS
from trainers.batch import informative
from trainers.buffer import Buffer, Take
from trainers.critic import Critic
from trainers.evaluations import due_versions
from trainers.learner import Learner
from trainers.online import Actors, run
from trainers.types import Batch, Evaluation, Group, Prompt, Scorer, StepStats, Weights

Examine = Callable[[Weights, int], Awaitable[Sequence[Evaluation]]]  # a version, and the seed of its samples
SEEDS = "studies"  # salts the samples' seeds: runs of one seed sample alike, whichever process runs them
VERSIONS = 100_000  # more than a run has


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the runs of a process share."""

    engine: Engine
    mailbox: Mailbox
    reward: Scorer
    reference: Scorer
    examine: Examine | None = None  # evaluates a version; without it there are no evaluations


@asynccontextmanager
async def stage(recipe: Recipe, name: str, examine: Examine | None = None) -> AsyncIterator[Stage]:
    """Start what runs of `recipe`, or of others with its models, rewards and sampling temperature, have in common.

    `name` is that of the files in shared memory: another one for each process.
    """
    engine, mailbox = Engine(engine_options(recipe, recipe.generator, SEEDS)), Mailbox(name)
    reference = ReferenceActor(
        recipe.model.path, recipe.reference, recipe.model.dtype, recipe.sampling.temperature, threads=1
    )
    try:
        await engine.start()
        yield Stage(
            engine=engine,
            mailbox=mailbox,
            reward=RewardActor(recipe.reward, threads=1),
            reference=reference,
            examine=examine,
        )
    finally:
        engine.close()
        mailbox.close()


class FullBuffer(Buffer):
    """A buffer that can be waited for until nothing more can be put into it."""

    async def full(self) -> None:
        """Return when each slot that will be given out is, and its group is there."""
        async with self._changed:
            await self._changed.wait_for(self._settled)

    def _settled(self) -> bool:
        given_out = self._held == self.slots or self._pending() == self._wanted
        return given_out and all(ticket in self._done for ticket in self._line)


class Solo:
    """Everything that `trainers.online.run` talks to, for one run on a stage; versions count on from the last run's."""

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        batch, steps = recipe.loop.batch_prompts, recipe.run.steps
        self.recipe, self.stage = recipe, stage
        self.sampling = training_sampling(recipe)
        self.learner = Learner(recipe)
        self.critic = Critic(recipe) if ALGORITHMS[recipe.algorithm.name].needs_critic else None
        self.buffer = FullBuffer(
            batch=batch,
            staleness=recipe.loop.staleness,
            wanted=steps * batch,
            discard_budget=recipe.loop.discard_budget,
            refill_budget=recipe.algorithm.refill_budget,
        )
        self.due = due_versions(steps, recipe.evaluation.every) if stage.examine else ()
        self.first = self.version = stage.engine.version + 1
        self.recorded: list[tuple[Take, StepStats]] = []
        self.evaluations: dict[int, Sequence[Evaluation]] = {}  # by the run's own version, from 0

    async def run(self) -> None:
        """Train from version 0 to the recipe's last."""
        scorers = [self.stage.reward]
        if self.recipe.algorithm.kl.where != "none":
            scorers.append(self.stage.reference)
        await run(
            Actors(generator=self, scorers=scorers, learner=self, evaluator=self),
            self.prompts(),
            self.buffer,
            self,
            start=self.weights(),
            steps=self.first + self.recipe.run.steps,
            keep=informative if self.recipe.algorithm.informative_groups else lambda _: True,
        )

    def prompts(self) -> Iterator[Prompt]:
        """Yield the run's prompts; their names hold its seed, so that seeds of a study sample independently."""
        seed = self.recipe.run.seed
        for prompt in load_prompts(self.recipe):
            yield replace(prompt, uid=f"{seed}-{prompt.uid}")

    async def generate(self, prompt: Prompt) -> Group:
        """Sample one group."""
        return await self.stage.engine.generate(prompt, self.sampling)

    async def load(self, weights: Weights) -> None:
        """Sample from `weights` from now on."""
        await load_weights(self.stage.engine, weights, self.stage.mailbox)

    async def step(self, batch: Batch) -> StepStats:
        """Train on `batch`, once nothing is left to generate."""
        await self.buffer.full()
        values = None if self.critic is None else self.critic.values(batch)
        stats = self.learner.step(batch, values)
        if self.critic is not None and values is not None:
            self.critic.step(batch, values)
        return stats

    async def publish(self) -> Weights:
        """Advance the policy version."""
        self.version += 1
        return self.weights()

    def weights(self) -> Weights:
        """Return the policy as it is."""
        buffer, sha256 = pack(self.learner.state_dict_for_publish())
        return Weights(version=self.version, hash=sha256, handle=buffer)

    async def evaluate(self, weights: Weights) -> Sequence[Evaluation]:
        """Evaluate a version that was pinned."""
        assert self.stage.examine is not None, "nothing is pinned without it"
        version = weights.version - self.first
        found = await self.stage.examine(weights, VERSIONS * self.recipe.run.seed + version)
        return [replace(one, version=version) for one in found]

    async def record(self, take: Take, stats: StepStats, weights: Weights) -> None:
        """Keep what a step was trained on and what it said."""
        self.recorded.append((take, stats))

    async def pin(self, weights: Weights) -> bool:
        """Whether this version is due for evaluation: the handle holds its weights."""
        return weights.version - self.first in self.due

    async def evaluated(self, results: Sequence[Evaluation]) -> None:
        """Keep the evaluations of one version."""
        self.evaluations[results[0].version] = results

    def stopping(self) -> bool:
        """Never asked to."""
        return False

    async def stopped(self) -> None:
        """Never return."""
        await asyncio.Event().wait()

    async def suspend(self) -> None:
        """Never called: nothing stops the run."""


async def play(recipe: Recipe, on: Stage) -> Solo:
    """Run `recipe` from its first step to its last."""
    solo = Solo(recipe, on)
    await solo.run()
    gc.collect()  # the engines of runs before: DeepSpeed's hold themselves in circles
    return solo
