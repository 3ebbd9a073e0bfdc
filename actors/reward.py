"""The reward: learned models and plain Python functions, weighed into one number per rollout."""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from actors.batching import Batcher
from configs.schema import DPO_BETA, EvalScorer, Reward, RewardComponent
from trainers.scoring import ImplicitReward, Judged, RewardModel, RuleFunction, apply_rule, combine, finite
from trainers.types import Group, Prompt


class Component(Protocol):
    """One named part of a reward, or one metric of an evaluation."""

    async def scores(self, prompt: Prompt, samples: Sequence[tuple[str, str]]) -> list[float]:
        """Return a raw score per (sample uid, completion). Raises DataError naming component and sample."""


class ModelComponent:
    """A reward model; calls that arrive during a forward pass share the next one."""

    def __init__(self, name: str, model: RewardModel | ImplicitReward) -> None:
        self.name = name
        self.batcher: Batcher[Judged, float] = Batcher(model.score)

    async def scores(self, prompt: Prompt, samples: Sequence[tuple[str, str]]) -> list[float]:
        """Return a raw score per (sample uid, completion). Raises DataError if one is not finite."""
        values = await self.batcher.submit([Judged(messages=prompt.messages, completion=text) for _, text in samples])
        return [finite(value, self.name, uid) for value, (uid, _) in zip(values, samples, strict=True)]


class RuleComponent:
    """A plain Python function."""

    def __init__(self, name: str, rule: RuleFunction) -> None:
        self.name = name
        self.rule = rule

    async def scores(self, prompt: Prompt, samples: Sequence[tuple[str, str]]) -> list[float]:
        """Return a raw score per (sample uid, completion). Raises DataError naming component and sample."""
        return await apply_rule(self.rule, self.name, prompt, samples)


def build(spec: RewardComponent | EvalScorer, reward: Reward) -> ModelComponent | RuleComponent:
    """Load what `spec` names, with the limits of the recipe's reward section."""
    if spec.function is not None:
        return RuleComponent(spec.name, RuleFunction(spec.function, deadline_s=reward.deadline_s))
    assert spec.model is not None, "the schema lets through components with a model or a function only"
    limits: Any = {name: getattr(reward, name) for name in ("dtype", "max_length", "token_budget", "share_prompts")}
    if spec.reference is None:
        return ModelComponent(spec.name, RewardModel(spec.model, **limits))
    return ModelComponent(spec.name, ImplicitReward(spec.model, spec.reference, beta=spec.beta or DPO_BETA, **limits))


class RewardActor:
    """Scores groups; made a Ray actor by `cluster/`, where each replica is one process.

    Raises UserError if a reward model or function cannot be had or used.
    """

    def __init__(self, reward: Reward, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.weights = {spec.name: spec.weight for spec in reward.components}
        self.components = {spec.name: build(spec, reward) for spec in reward.components}

    async def ready(self) -> bool:
        """Answer once everything is loaded."""
        return True

    async def score(self, group: Group) -> list[dict[str, Any]]:
        """Return raw scores by component and their weighted sum, per rollout."""
        samples = [(rollout.uid, rollout.text) for rollout in group.rollouts]
        columns = await asyncio.gather(*(part.scores(group.prompt, samples) for part in self.components.values()))
        rows = [dict(zip(self.components, values, strict=True)) for values in zip(*columns, strict=True)]
        return [{"rewards": raw, "reward": combine(raw, self.weights)} for raw in rows]

    async def times(self) -> dict[str, float]:
        """Seconds busy and waiting since the start; functions are the user's time and count as waiting."""
        each = [part.batcher.times() for part in self.components.values() if isinstance(part, ModelComponent)]
        return {key: max((times[key] for times in each), default=0.0) for key in ("busy", "waiting")}
