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
    centred = torch.where(_equal(rewards, groups), torch.zeros_like(centred), centred)
    if not divide_by_std:
        return centred
    std = (zeros.index_add(0, index, centred.square()) / count).sqrt()
    return centred / (std[index] + eps)


def leave_one_out(rewards: Tensor, groups: Tensor, *, divide_by_std: bool = False) -> Tensor:
    """Return each reward minus the mean of the others of its group, as `group_advantages` divided or not.

    rewards (B,), groups (B,) any integers -> (B,); a group with one member gives 0. The baseline does not depend on the
    rollout itself, so undivided the gradient is unbiased. Kool et al. 2019; Ahmadian et al. 2024 (RLOO).
    """
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    size = count.to(rewards.dtype)[index]
    relative: Tensor = group_advantages(rewards, groups, divide_by_std=divide_by_std) * size / (size - 1).clamp(min=1)
    return relative


def best_of_group(rewards: Tensor, groups: Tensor, number: int) -> Tensor:
    """Return which rollouts (B,) are among the `number` best of their group; none where all rewards are equal.

    rewards (B,), groups (B,). Of equal rewards the earlier rollout is taken.
    """
    return (_rank(-rewards, groups) < number) & ~_equal(rewards, groups)


def best_and_worst(rewards: Tensor, groups: Tensor, usable: Tensor) -> Tensor:
    """Return +1 (B,) for the best rollout of each group, -1 for its worst, 0 for others and where all are equal.

    rewards (B,), groups (B,), usable (B,) bool: which rollouts may be taken.
    """
    signs = torch.zeros_like(rewards)
    rewards, groups = rewards[usable], groups[usable]
    best, worst = (_rank(keys, groups) == 0 for keys in (-rewards, rewards))
    signs[usable] = (best.to(signs.dtype) - worst.to(signs.dtype)) * ~_equal(rewards, groups)
    return signs


def _rank(keys: Tensor, groups: Tensor) -> Tensor:
    """Return the place (B,) of each row in its group, smallest key first, equal keys in the order given."""
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    order = torch.argsort(keys, stable=True)
    order = order[torch.argsort(index[order], stable=True)]
    starts = torch.repeat_interleave(count.cumsum(0) - count, count)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=keys.device) - starts
    return rank


def _equal(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return whether all rewards of each row's group are equal, (B,)."""
    unique, index = torch.unique(groups, return_inverse=True)
    zeros = rewards.new_zeros(len(unique))
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    return (highest == lowest)[index]


def overlong_penalty(lengths: Tensor, limit: int, *, share: float, penalty: float) -> Tensor:
    """Return what completions of `lengths` (B,) tokens lose: 0 up to the last `share` of `limit`, then up to `penalty`.

    In the unit of the reward. Yu et al. 2025 (DAPO), eq. 13.
    """
    buffer = share * limit
    return penalty * ((lengths - (limit - buffer)) / buffer).clamp(0, 1)


def token_rewards(rewards: Tensor, mask: Tensor, kl: Tensor | None, coefficient: float) -> Tensor:
    """Return the score at the last completion token, minus `coefficient` times k1 at every token.

    rewards (B,), mask (B, T), kl (B, T) in nats or None -> (B, T), 0 outside the mask; an empty completion has no
    token to carry its score. Ziegler et al. 2019; Ouyang et al. 2022, eq. 2.
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
