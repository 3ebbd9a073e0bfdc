"""The table of algorithms.

To add one: its facts in configs.algorithms.FACTS, a pure function here, a line in ALGORITHMS.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import Tensor

from configs.algorithms import FACTS, AlgorithmFacts
from trainers.advantages import gae, group_advantages, token_rewards, whiten


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    """What any algorithm may compute advantages from: one whole batch of B rollouts, T completion tokens."""

    rewards: Tensor  # (B,)
    groups: Tensor  # (B,) rollouts of one prompt share a number
    mask: Tensor  # (B, T) true on completion tokens
    kl: Tensor | None = None  # (B, T) k1 of the policy that sampled; needed only with kl_coefficient > 0
    kl_coefficient: float = 0.0  # 0: the KL is not in the reward
    values: Tensor | None = None  # (B, T) value before each token; for algorithms with a critic
    gamma: float = 1.0
    lam: float = 0.95
    divide_by_std: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageOutputs:
    """Advantages, and what the critic is fitted to."""

    advantages: Tensor  # (B, T), 0 outside the mask
    returns: Tensor | None = None  # (B, T), 0 outside the mask


AdvantageFunction = Callable[[AdvantageInputs], AdvantageOutputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm(AlgorithmFacts):
    """An algorithm's facts together with its advantage function."""

    advantages: AdvantageFunction


def grpo(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Give every token its rollout's reward relative to the group, the KL of the whole completion taken off.

    Shao et al. 2024 (DeepSeekMath), section 4.1.2; there the KL is in the loss.
    """
    per_token = token_rewards(inputs.rewards, inputs.mask, _reward_kl(inputs), inputs.kl_coefficient)
    # An empty completion has no token for its score, yet belongs in the group's mean.
    penalised = per_token.sum(1).where(inputs.mask.bool().any(1), inputs.rewards)
    advantages = group_advantages(penalised, inputs.groups, divide_by_std=inputs.divide_by_std)
    return AdvantageOutputs(advantages=advantages[:, None] * inputs.mask)


def ppo(inputs: AdvantageInputs) -> AdvantageOutputs:
    """Estimate whitened advantages with a critic.

    Raises ValueError without values. Schulman et al. 2016 (GAE); Ouyang et al. 2022 for the reward of each token.
    """
    if inputs.values is None:
        raise ValueError("ppo needs the critic's values")
    per_token = token_rewards(inputs.rewards, inputs.mask, _reward_kl(inputs), inputs.kl_coefficient)
    advantages, returns = gae(per_token, inputs.values, inputs.mask, gamma=inputs.gamma, lam=inputs.lam)
    return AdvantageOutputs(advantages=whiten(advantages, inputs.mask), returns=returns)


def _reward_kl(inputs: AdvantageInputs) -> Tensor | None:
    if inputs.kl_coefficient and inputs.kl is None:
        raise ValueError("a KL term in the reward needs the per-token KL")
    return inputs.kl if inputs.kl_coefficient else None


_FUNCTIONS: dict[str, AdvantageFunction] = {"grpo": grpo, "ppo": ppo}
ALGORITHMS: dict[str, Algorithm] = {
    name: Algorithm(**asdict(FACTS[name]), advantages=function) for name, function in _FUNCTIONS.items()
}
