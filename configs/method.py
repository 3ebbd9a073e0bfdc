"""The section of a recipe that says how the policy learns: the algorithm, and the options that cut across all.

Part of `configs.schema`, which everybody imports.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from configs.algorithms import FACTS


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class KL(Section):
    """Where and how the distance from the reference is charged; what is not given, the algorithm decides."""

    where: Literal["loss", "reward", "pairs", "none"] = "loss"
    """pairs: β of a preference loss, in which the reference stands already."""
    estimator: Literal["k1", "k2", "k3"] = "k2"
    coefficient: float = Field(0.05, ge=0)
    target: float | None = Field(None, gt=0)
    """With a target the coefficient adapts (Ziegler et al. 2019, section 2.2)."""
    horizon: int = Field(10_000, ge=1)


class OffPolicy(Section):
    """Importance weights proximal / behaviour policy, for rollouts of older versions or of another engine."""

    weight: Literal["none", "truncate", "mask"] = "truncate"
    """truncate: weights above `cap` count as `cap`; mask: what lies outside [floor, cap] is not trained on."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio of each token, of the whole completion, or the geometric mean over the completion's tokens."""
    cap: float = Field(2.0, gt=0)
    floor: float = Field(0.0, ge=0)
    """For mask."""
    reject_below: float | None = Field(None, gt=0, lt=1)
    """A completion with a token whose ratio is below this is not trained on at all, whatever `weight` says."""


class Overlong(Section):
    """What completions near the length limit lose of their reward, rising over the last tokens before it."""

    share: float = Field(0.2, gt=0, le=1)
    """Of sampling.max_tokens, in which the penalty rises from 0."""
    penalty: float = Field(1.0, ge=0)
    """At the limit, in the reward's unit."""


class Algorithm(Section):
    name: str = "grpo"
    """A key of trainers.algorithms.ALGORITHMS. It decides the default of what is not given here: docs/algorithms.md."""
    kl: KL = KL()
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    """Bound of ratio · advantage for negative advantages; none: unbounded."""
    ratio: Literal["token", "sequence"] = "token"
    """sequence: every token has the geometric mean of its completion's ratios."""
    proximal: Literal["recompute", "behaviour"] = "recompute"
    """Which policy clipping is about: the learner's before the step, or the one that sampled, which spares a forward
    pass where a step has several updates; then there are no importance weights, the ratio holds them."""
    off_policy: OffPolicy = OffPolicy()
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per epoch over a batch."""
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    value_clip: float | None = Field(0.2, gt=0)
    normalise: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of their group or of the batch, whose mean goes too."""
    aggregate: Literal["token", "sequence", "fixed"] = "token"
    """Mean loss over all tokens of a minibatch; over rollouts of each one's token mean; or over rollouts of each one's
    sum divided by `fixed_length`, so that no token counts less in a long completion."""
    fixed_length: int | None = Field(None, ge=1)
    """none: sampling.max_tokens."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Weight of the policy's entropy per token, in the loss."""
    reward_scale: Literal["none", "running"] = "none"
    """running: rewards lose the mean and are divided by the standard deviation of all rewards so far."""
    reward_clip: float | None = Field(None, gt=0)
    """Largest absolute reward, after scaling."""
    overlong: Overlong | None = None
    informative_groups: bool = False
    """Train only on groups whose rewards differ; others are replaced by further prompts and counted."""
    refill_budget: float = Field(0.9, ge=0, le=1)
    """Share of the groups that may be without difference before the run is stopped."""
    best: int = Field(1, ge=1)
    """Of rft: how many completions of a group are imitated."""
    pair_labels: Literal["bradley_terry", "hard"] = "bradley_terry"
    """Of pairs: preferred with probability σ(difference of rewards), or for certain."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_algorithm(cls, given: Any) -> Any:
        """Fill in what the algorithm sets otherwise, and its own place and estimator of the KL term."""
        name = given.get("name", "grpo") if isinstance(given, dict) else None
        kl = given.get("kl", {}) if isinstance(given, dict) else None
        kl = kl.model_dump(exclude_unset=True) if isinstance(kl, KL) else kl
        if not isinstance(name, str) or name not in FACTS or not isinstance(kl, dict):
            return given
        facts = FACTS[name]
        where = kl.get("where", facts.kl_where)
        filled = {"kl": {"where": where, "estimator": "k1" if where == "reward" else "k2"} | kl}
        for key, default in facts.options.items():
            mine = given.get(key, default)
            filled[key] = default | mine if isinstance(default, dict) and isinstance(mine, dict) else mine
        return given | filled
