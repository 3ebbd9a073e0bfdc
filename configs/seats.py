"""Every actor process that a recipe starts, and what it asks of the machine."""

from dataclasses import dataclass

from configs.algorithms import FACTS
from configs.schema import Recipe, Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One actor process: its name, and what it needs."""

    name: str  # "generator-0"
    resources: Resources


def seats(recipe: Recipe) -> list[Seat]:
    """List every actor process of `headroom train`."""
    wanted = [
        ("learner", recipe.learner.ranks, recipe.learner.resources),
        ("critic", recipe.critic.ranks if FACTS[recipe.algorithm.name].needs_critic else 0, recipe.critic.resources),
        ("generator", recipe.generator.replicas, recipe.generator.resources),
        ("reward", recipe.reward.replicas, recipe.reward.resources),
        ("reference", int(recipe.algorithm.kl.where != "none"), recipe.reference.resources),
        ("evaluator", int(bool(recipe.evaluation.tasks)), recipe.evaluation.resources),
    ]
    return [Seat(name=f"{role}-{i}", resources=needs) for role, count, needs in wanted for i in range(count)]
