"""Per-token losses: pure functions on (B, T) tensors, B rollouts of T completion tokens.

Padding may hold any finite number: `token_weights` gives it weight 0.
"""

import math
from typing import Literal

import torch
from torch import Tensor

LARGEST = 80.0  # log of a ratio: beyond, float32 overflows soon, and what clipping sets to 0 would be 0 · inf


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Return a per-token estimate, in nats, of KL(policy || reference) at tokens sampled from the policy.

    All (B, T). As values k1 and k3 are unbiased. As losses only k2 has the gradient of the KL in expectation: that
    of k1 is 0, that of k3 belongs to KL(reference || policy). Summed over a completion, k2 still leaves out how a token
    changes the KL of later ones; k1 in the reward has the whole gradient. J. Schulman, "Approximating KL divergence",
    2020.
    """
    log_ratio = logprobs - reference_logprobs
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio


def kl_of_stale(policy: Tensor, reference: Tensor, behaviour: Tensor) -> Tensor:
    """Return a per-token estimate, in nats, of KL(policy || reference) at tokens that `behaviour` sampled, in doubles.

    All log-probs (B, T). k3 weighed by w = policy / behaviour: unbiased at every token given those before it, and k3
    itself where the policy sampled. Without w a token that the policy has nearly unlearned counts reference / policy
    in full, and a few of them are thousands of nats. The product w · reference / policy is reference / behaviour.
    """
    policy, reference, behaviour = (logprobs.double() for logprobs in (policy, reference, behaviour))
    weights = (policy - behaviour).exp()
    return (reference - behaviour).exp() - weights * (1 + reference - policy)


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the clipped policy loss of each token, and where clipping removed its gradient (bool).

    All (B, T); log_ratio of current and proximal policy, the ratio is limited to [1 - clip_low, 1 + clip_high]. With
    `dual_clip` the loss of a negative advantage A is at most -A · dual_clip. Schulman et al. 2017 (PPO), eq. 7; two
    bounds as in Yu et al. 2025 (DAPO); the third of Ye et al. 2020 (Dual-clip PPO).
    """
    ratio = torch.exp(log_ratio.clamp(max=LARGEST))
    loss = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = limited > loss
    worst = torch.maximum(loss, limited)
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -advantages * dual_clip, torch.full_like(advantages, math.inf))
        clipped = clipped | (worst > bound)
        worst = torch.minimum(worst, bound)
    return worst, clipped.detach()


def clipped_weight_surrogate(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Return -A · clipped ratio · log-prob of each token, and where the ratio was clipped (bool).

    All (B, T). The ratio is a weight without gradient, so a token keeps its gradient when it is clipped. MiniMax 2025
    (CISPO).
    """
    ratio = torch.exp(log_ratio).detach()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -advantages * bounded * logprobs, bounded != ratio


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Return half the squared error of each value, the worse of it and of the value kept within `clip` of the old.

    All (B, T); `clip` in units of the return, None for the plain error. Schulman et al. 2016 (GAE), section 5;
    the clipping is that of OpenAI's PPO implementation.
    """
    error = (values - returns).square()
    if clip is not None:
        limited = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (limited - returns).square())
    return error / 2


def token_weights(
    mask: Tensor, aggregate: Literal["token", "sequence", "fixed"], *, fixed_length: int | None = None
) -> Tensor:
    """Return weights (B, T) with which `(loss * weights).sum()` is the mean loss of a minibatch.

    mask (B, T) of the WHOLE minibatch: rows may then go to any micro-batch and rank, and the sums add up. token: mean
    over all tokens; sequence: mean over rollouts of each one's token mean, an empty completion counting as 0; fixed:
    mean over rollouts of each one's sum / fixed_length (Liu et al. 2025, Dr. GRPO). Raises ValueError without a length.
    """
    weights = mask.to(torch.float32)
    rollouts = max(mask.shape[0], 1)
    match aggregate:
        case "token":
            return weights / weights.sum().clamp(min=1)
        case "sequence":
            return weights / weights.sum(1, keepdim=True).clamp(min=1) / rollouts
        case "fixed":
            if fixed_length is None:
                raise ValueError("aggregate=fixed needs fixed_length")
            return weights / fixed_length / rollouts
