"""Downstream evaluations of pinned policy versions, on an engine of their own."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import torch

from actors.engine import EngineOptions, sampling_of
from actors.generator import Generator
from actors.reward import ModelComponent, RuleComponent, build
from configs.errors import UserError
from configs.schema import EvalTask, Recipe
from trainers.data import load_tokenizer
from trainers.evaluations import TaskData, prepare, summarise
from trainers.types import DataError, Evaluation, Group, InfraError, Prompt, Sampling, Weights

Scorer = ModelComponent | RuleComponent


class EvaluatorActor:
    """Runs the recipe's evaluation tasks; made a Ray actor by `cluster/`.

    Prompts and samples' seeds are the same at every version, so that scores can be paired.
    """

    def __init__(self, recipe: Recipe, run: str) -> None:
        config = recipe.evaluation
        self._recipe = recipe
        self._deadline_s = config.deadline_s
        threads = max(1, min(os.cpu_count() or 1, round(config.resources.cpus)))
        if config.resources.gpus == 0:
            torch.set_num_threads(threads)
        options = EngineOptions(
            model_path=recipe.model.path,
            run=f"{run} evaluation",  # its own shared memory: generators delete versions that are pinned here
            dtype=recipe.model.dtype,
            max_length=recipe.model.max_length,
            deadline_s=config.deadline_s,
            kv_cache_gb=config.kv_cache_gb,
            threads=threads,
            engine=config.engine,
        )
        self._generator = Generator(options, Sampling(n=1, max_tokens=1))
        self._tasks: dict[str, TaskData] = {}
        self._scorers: dict[tuple[str | float | None, ...], Scorer] = {}
        self._one_at_a_time = asyncio.Lock()
        self._started = time.monotonic()
        self._busy_s = 0.0

    async def start(self) -> None:
        """Start the engine; data and scorers are loaded when first needed, as the run may still be making them."""
        await self._generator.start()

    async def evaluate(self, weights: Weights, landmark: bool) -> list[Evaluation]:
        """Run every task that is due at this version; `landmark`: it is the run's first, middle or last.

        Raises UserError for data or scorers that cannot be used, InfraError if the engine failed.
        """
        due = [task for task in self._recipe.evaluation.tasks if landmark or task.at == "every"]
        if not due:
            return []
        async with self._serving(weights):
            return [await self._run(task, weights.version, await self._prompts(task)) for task in due]

    async def evaluate_on(self, weights: Weights, task: str, prompts: Sequence[Prompt]) -> Evaluation:
        """Run one task on other prompts than its own, versions in any order; raises as `evaluate` does.

        After this `evaluate` is of no use: the engine is beyond its versions.
        """
        [asked] = [of for of in self._recipe.evaluation.tasks if of.name == task]
        async with self._serving(weights, in_order=False):
            return await self._run(asked, weights.version, prompts)

    async def times(self) -> dict[str, float]:
        """Seconds busy and waiting since the start."""
        return {"busy": self._busy_s, "waiting": time.monotonic() - self._started - self._busy_s}

    async def close(self) -> None:
        """End the engine."""
        await self._generator.close()

    @asynccontextmanager
    async def _serving(self, weights: Weights, *, in_order: bool = True) -> AsyncIterator[None]:
        async with self._one_at_a_time:
            began = time.monotonic()
            try:
                if not in_order:  # the engine's own count goes up only, and says nothing of the policy version then
                    weights = replace(weights, version=await self._generator.check() + 1)
                await self._generator.load(weights)
                if await self._generator.check() != weights.version:
                    raise InfraError(f"the evaluator is beyond version {weights.version}; versions must come in order")
                yield
            finally:
                self._busy_s += time.monotonic() - began

    async def _prompts(self, task: EvalTask) -> tuple[Prompt, ...]:
        if task.name not in self._tasks:
            tokenizer = load_tokenizer(self._recipe.model.path)
            self._tasks[task.name] = await asyncio.to_thread(prepare, task, tokenizer, self._recipe.model.max_length)
        return self._tasks[task.name].prompts

    async def _run(self, task: EvalTask, version: int, prompts: Sequence[Prompt]) -> Evaluation:
        scorers = {spec.name: await self._scorer(task, spec.name) for spec in task.scorers}
        sampling = sampling_of(task.sampling)
        try:
            groups = await asyncio.gather(*(self._generator.generate(prompt, sampling) for prompt in prompts))
            raw = {
                name: await asyncio.gather(*(scorer.scores(group.prompt, texts(group)) for group in groups))
                for name, scorer in scorers.items()
            }
        except DataError as error:  # a prompt left out would break the pairing of versions
            raise UserError(f"evaluation task {task.name}: {error}; correct the scorer or the data") from error
        return summarise(version, task.name, groups, raw)

    async def _scorer(self, task: EvalTask, name: str) -> Scorer:
        spec = next(spec for spec in task.scorers if spec.name == name)
        key = (spec.model, spec.reference, spec.beta, spec.function)
        if key not in self._scorers:  # one model may serve several tasks
            self._scorers[key] = await asyncio.to_thread(build, spec, self._recipe.reward)
        return self._scorers[key]


def texts(group: Group) -> list[tuple[str, str]]:
    """Return (sample uid, completion) of each rollout."""
    return [(rollout.uid, rollout.text) for rollout in group.rollouts]
