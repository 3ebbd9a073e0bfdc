"""The table of algorithms.

To add one: its facts in configs.algorithms.FACTS, a pure function or two here, a line in ALGORITHMS.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from configs.algorithms import FACTS, AlgorithmFacts
from trainers.advantages import (
    best_and_worst,
    best_of_group,
    gae,
    group_advantages,
    leave_one_out,
    token_rewards,
    whiten,
)
from trainers.importance import level_log_ratio
from trainers.losses import clipped_surrogate, clipped_weight_surrogate
from trainers.preferences import dpo_loss, ipo_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    """What any algorithm may compute advantages from: one whole batch of B rollouts, T completion tokens."""

    rewards: Tensor  # (B,)
    groups: Tensor  # (B,) rollouts of one prompt share a number
    mask: Tensor  # (B, T) true on completion tokens
    kl: Tensor | None = None  # (B, T) k1 of the policy that sampled; needed only with kl_coefficient > 0
    kl_coefficient: float = 0.0  # 0: the KL is not in the reward
    values: Tensor | None = None  # (B, T) value before each token; for algorithms with a critic
    greedy: Tensor | None = None  # (B,) reward of the prompt's greedy completion; for those that compare with it
    gamma: float = 1.0
    lam: float = 0.95
    normalise: Literal["group", "batch", "none"] = "group"
    best: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageOutputs:
    """Advantages, what the critic is fitted to, and which rollouts are trained on."""

    advantages: Tensor  # (B, T), 0 outside the mask
    returns: Tensor | None = None  # (B, T), 0 outside the mask
    chosen: Tensor | None = None  # (B,) bool; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What any loss may read: b rollouts of a micro-batch, T completion tokens."""

    logprobs: Tensor  # (b, T) of the current policy, with gradient
    proximal: Tensor  # (b, T) of the policy that clipping is about
    advantages: Tensor  # (b, T)
    mask: Tensor  # (b, T)
    rewards: Tensor  # (b,)
    groups: Tensor  # (b,)
    reference: Tensor | None = None  # (b, T)
    beta: float = 0.0  # the KL coefficient
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    labels: Literal["bradley_terry", "hard"] = "bradley_terry"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """The loss of each token before any KL term, entropy bonus or importance weight."""

    loss: Tensor  # (b, T)
    clipped: Tensor  # (b, T) bool


AdvantageFunction = Callable[[AdvantageInputs], AdvantageOutputs]
LossFunction = Callable[[LossInputs], LossOutputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm(AlgorithmFacts):
    """An algorithm's facts together with its functions."""

    advantages: AdvantageFunction
    loss: LossFunction


def group_mean(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Give every token its rollout's reward relative to the group's mean. Shao et al. 2024, section 4.1.2."""
    rewards = _penalised(inputs)
    relative = group_advantages(rewards, inputs.groups, divide_by_std=inputs.normalise == "group")
    return AdvantageOutputs(advantages=_per_token(relative, inputs))


def others_mean(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Give every token its rollout's reward relative to the mean of the others. Ahmadian et al. 2024 (RLOO)."""
    relative = leave_one_out(_penalised(inputs), inputs.groups, divide_by_std=inputs.normalise == "group")
    return AdvantageOutputs(advantages=_per_token(relative, inputs))


def greedy_baseline(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Give every token its rollout's reward relative to that of the greedy completion. Li et al. 2023 (ReMax).

    Raises ValueError without greedy rewards.
    """
    if inputs.greedy is None:
        raise ValueError("remax needs the rewards of greedy completions")
    return AdvantageOutputs(advantages=_per_token(_penalised(inputs) - inputs.greedy, inputs))


def to_go(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Give every token the discounted reward from itself on, without a baseline. Hu et al. 2025 (REINFORCE++)."""
    per_token = token_rewards(inputs.rewards, inputs.mask, _reward_kl(inputs), inputs.kl_coefficient)
    returns, _ = gae(per_token, torch.zeros_like(per_token), inputs.mask, gamma=inputs.gamma, lam=1.0)
    return AdvantageOutputs(advantages=whiten(returns, inputs.mask) if inputs.normalise == "batch" else returns)


def critic_baseline(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Estimate advantages with a critic. Schulman et al. 2016 (GAE); Ouyang et al. 2022 for the reward of each token.

    Raises ValueError without values.
    """
    if inputs.values is None:
        raise ValueError("ppo needs the critic's values")
    per_token = token_rewards(inputs.rewards, inputs.mask, _reward_kl(inputs), inputs.kl_coefficient)
    advantages, returns = gae(per_token, inputs.values, inputs.mask, gamma=inputs.gamma, lam=inputs.lam)
    if inputs.normalise == "batch":
        advantages = whiten(advantages, inputs.mask)
    return AdvantageOutputs(advantages=advantages, returns=returns)


def imitate_best(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Choose the best rollouts of each group, all with weight 1. Dong et al. 2023 (RAFT)."""
    chosen = best_of_group(_penalised(inputs), inputs.groups, inputs.best)
    return AdvantageOutputs(advantages=chosen[:, None] * inputs.mask.to(inputs.rewards.dtype), chosen=chosen)


def best_against_worst(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Choose the best (+1) and the worst (-1) rollout of each group, empty ones left out."""
    signs = best_and_worst(inputs.rewards, inputs.groups, inputs.mask.bool().any(1))
    return AdvantageOutputs(advantages=signs[:, None] * inputs.mask, chosen=signs != 0)


def surrogate(inputs: LossInputs) -> LossOutputs:
    """Limit what a step gains from moving the ratio of a token, or of a completion, away from 1."""
    loss, clipped = clipped_surrogate(
        _log_ratio(inputs),
        inputs.advantages,
        clip_low=inputs.clip_low,
        clip_high=inputs.clip_high,
        dual_clip=inputs.dual_clip,
    )
    return LossOutputs(loss=loss, clipped=clipped)


def weighted_likelihood(inputs: LossInputs) -> LossOutputs:
    """Weight the log-prob of each token by its advantage and its bounded ratio. MiniMax 2025 (CISPO)."""
    loss, clipped = clipped_weight_surrogate(
        inputs.logprobs,
        _log_ratio(inputs),
        inputs.advantages,
        clip_low=inputs.clip_low,
        clip_high=inputs.clip_high,
    )
    return LossOutputs(loss=loss, clipped=clipped)


def likelihood(inputs: LossInputs) -> LossOutputs:
    """Imitate: the negative log-likelihood, weighted by the advantages."""
    return LossOutputs(
        loss=-inputs.advantages * inputs.logprobs, clipped=torch.zeros_like(inputs.mask, dtype=torch.bool)
    )


def dpo(inputs: LossInputs) -> LossOutputs:
    """Fit the reward that the policy implies to the labels of pairs. Rafailov et al. 2023, eq. 7; cDPO."""
    difference, label, pairs = _pairs(inputs)
    return _of_pairs(dpo_loss(difference, inputs.beta, label=label), pairs, inputs)


def ipo(inputs: LossInputs) -> LossOutputs:
    """Bring the log-ratio of a pair to what its label is worth. Azar et al. 2023, eq. 17, there with hard labels."""
    difference, label, pairs = _pairs(inputs)
    return _of_pairs(ipo_loss(difference, inputs.beta, label=label), pairs, inputs)


def _penalised(inputs: AdvantageInputs) -> Tensor:
    """Return the rewards (B,), the KL of the whole completion taken off where it belongs there."""
    per_token = token_rewards(inputs.rewards, inputs.mask, _reward_kl(inputs), inputs.kl_coefficient)
    # An empty completion has no token for its score, yet belongs in the group's mean.
    return per_token.sum(1).where(inputs.mask.bool().any(1), inputs.rewards)


def _per_token(relative: Tensor, inputs: AdvantageInputs) -> Tensor:
    advantages = relative[:, None] * inputs.mask
    return whiten(advantages, inputs.mask) if inputs.normalise == "batch" else advantages


def _reward_kl(inputs: AdvantageInputs) -> Tensor | None:
    if inputs.kl_coefficient and inputs.kl is None:
        raise ValueError("a KL term in the reward needs the per-token KL")
    return inputs.kl if inputs.kl_coefficient else None


def _log_ratio(inputs: LossInputs) -> Tensor:
    log_ratio = inputs.logprobs - inputs.proximal
    return log_ratio if inputs.ratio == "token" else level_log_ratio(log_ratio, inputs.mask.bool(), "geometric")


def _pairs(inputs: LossInputs) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return log π/π₀ of best less worst (p,), the label of each pair (p,), and the pairs' rows."""
    if inputs.reference is None:
        raise ValueError("a loss of pairs needs reference log-probs, and the batch has none")
    order = torch.argsort(inputs.groups, stable=True)
    signs = inputs.advantages.sum(1)[order]
    best, worst = order[signs > 0], order[signs < 0]
    log_ratio = torch.where(inputs.mask.bool(), inputs.logprobs - inputs.reference, torch.zeros_like(inputs.logprobs))
    whole, better = log_ratio.sum(1), inputs.rewards[best] - inputs.rewards[worst]
    label = torch.sigmoid(better) if inputs.labels == "bradley_terry" else torch.ones_like(better)
    return whole[best] - whole[worst], label, (best, worst)


def _of_pairs(losses: Tensor, pairs: tuple[Tensor, Tensor], inputs: LossInputs) -> LossOutputs:
    """Give both rows of a pair its loss, at every token: their mean over rows of token means is that over pairs."""
    rows = torch.zeros_like(inputs.logprobs[:, 0]).index_put((torch.cat(pairs),), torch.cat([losses, losses]))
    return LossOutputs(loss=rows[:, None] * inputs.mask, clipped=torch.zeros_like(inputs.mask, dtype=torch.bool))


_FUNCTIONS: dict[str, tuple[AdvantageFunction, LossFunction]] = {
    "grpo": (group_mean, surrogate),
    "dr_grpo": (group_mean, surrogate),
    "rloo": (others_mean, surrogate),
    "reinforce_pp": (to_go, surrogate),
    "reinforce_pp_baseline": (group_mean, surrogate),
    "remax": (greedy_baseline, surrogate),
    "ppo": (critic_baseline, surrogate),
    "dapo": (group_mean, surrogate),
    "gspo": (group_mean, surrogate),
    "cispo": (group_mean, weighted_likelihood),
    "rft": (imitate_best, likelihood),
    "online_dpo": (best_against_worst, dpo),
    "online_ipo": (best_against_worst, ipo),
}
ALGORITHMS: dict[str, Algorithm] = {
    name: Algorithm(**asdict(FACTS[name]), advantages=one, loss=other) for name, (one, other) in _FUNCTIONS.items()
}
"""Why so many share functions: what differs is in their facts' `options`."""
