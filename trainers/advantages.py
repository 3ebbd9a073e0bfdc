"""Advantages: pure functions on tensors of B rollouts and T completion tokens.

Statistics are taken over all rows handed in, so callers pass the whole batch and split it afterwards.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor, *, divide_by_std: bool, eps: float = 1e-6) -> Tensor:
    """Return each reward minus its group's mean, optionally divided by the group's standard deviation.

    rewards (B,), groups (B,) any integers -> (B,). The population deviation is used: advantages then have mean
    square 1 for every group size, so the step size does not change with n. A group with one member or without
    spread gives exactly 0. As the mean includes the rollout itself, the expected gradient of groups of n is (n-1)/n
    of the true one where nothing is divided. GRPO: Shao et al. 2024 (DeepSeekMath), section 4.1.2.
    """
    _, index = torch.unique(groups, return_inverse=True)
    number = int(index.max()) + 1 if index.numel() else 0
    count = torch.bincount(index, minlength=number).to(rewards.dtype)
    zeros = rewards.new_zeros(number)
    centred = rewards - (zeros.index_add(0, index, rewards) / count)[index]
    # Rounding leaves a residue where all rewards are equal, and the division would make noise of it.
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    centred = torch.where((highest == lowest)[index], torch.zeros_like(centred), centred)
    if not divide_by_std:
        return centred
    std = (zeros.index_add(0, index, centred.square()) / count).sqrt()
    return centred / (std[index] + eps)


def token_rewards(rewards: Tensor, mask: Tensor, kl: Tensor | None, coefficient: float) -> Tensor:
    """Return the score at the last completion token, minus `coefficient` times k1 at every token.

    rewards (B,), mask (B, T), kl (B, T) in nats or None -> (B, T), 0 outside the mask; an empty completion has no
    token to carry its score. Ziegler et al. 2019, eq. 1 and section 2.1; Ouyang et al. 2022, eq. 2.
    """
    mask = mask.bool()
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    scores = torch.where(last, rewards[:, None], torch.zeros_like(rewards)[:, None])
    if kl is None:
        return scores
    return scores - coefficient * torch.where(mask, kl, torch.zeros_like(kl))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and the returns that the critic is fitted to (advantage + value).

    All (B, T), 0 outside the mask; values[:, t] is the value before token t. What follows the last token is worth
    0, for completions cut at the length limit too. Schulman et al. 2016, eq. 16.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    running = values.new_zeros(values.shape[0])
    next_value = torch.zeros_like(running)
    for t in range(values.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = running
    zeros = torch.zeros_like(values)
    return torch.where(mask, advantages, zeros), torch.where(mask, advantages + values, zeros)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` (B, T) with mean 0 and population variance 1 over the mask, and 0 outside it."""
    mask = mask.bool()
    zeros = torch.zeros_like(x)
    count = mask.sum().clamp(min=1)
    centred = torch.where(mask, x - torch.where(mask, x, zeros).sum() / count, zeros)
    return centred * (centred.square().sum() / count + 1e-8).rsqrt()
