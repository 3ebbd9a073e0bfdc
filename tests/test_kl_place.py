"""Where the KL term stands decides where a policy comes to rest: exact means, completions of one token and of three."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.enumerable import (
    COUNT,
    REWARDS,
    config,
    expected_gradient,
    leaves,
    logprobs_of,
    one_thread,
    optimum,
    random_tables,
    tokenwise,
)
from trainers.losses import kl_estimate

__all__ = ["one_thread"]
BETA = 0.5
Loss = Callable[[Tensor, Tensor], Tensor]  # log-probs, those of the reference (64, 1) -> loss (64, 1)


def random_logits(seed: int) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bandit(logits: Tensor) -> Tensor:
    """Log-probs (64, 1) of a policy with 64 one-token completions."""
    return logits.log_softmax(-1)[:, None]


def mean_gradient(logits: Tensor, loss: Loss, reference: Tensor) -> Tensor:
    """Mean over the policy of each sampled completion's loss gradient."""
    (logits,) = leaves([logits])
    logprobs = bandit(logits)
    (gradient,) = torch.autograd.grad((logprobs.exp().detach() * loss(logprobs, reference)).sum(), logits)
    return gradient


def reinforce(logprobs: Tensor, rewards: Tensor) -> Tensor:
    return -rewards * (logprobs - logprobs.detach()).exp()


def k1_in_reward(logprobs: Tensor, reference: Tensor) -> Tensor:
    return reinforce(logprobs, REWARDS[:, None] - BETA * kl_estimate(logprobs, reference, "k1").detach())


def k1_in_loss(logprobs: Tensor, reference: Tensor) -> Tensor:
    return reinforce(logprobs, REWARDS[:, None]) + BETA * kl_estimate(logprobs, reference, "k1")


def k2_in_loss(logprobs: Tensor, reference: Tensor) -> Tensor:
    return reinforce(logprobs, REWARDS[:, None]) + BETA * kl_estimate(logprobs, reference, "k2")


def k3_in_loss(logprobs: Tensor, reference: Tensor) -> Tensor:
    return reinforce(logprobs, REWARDS[:, None]) + BETA * kl_estimate(logprobs, reference, "k3")


def descend(loss: Loss, reference: Tensor) -> Tensor:
    """Follow the mean natural gradient from random logits to where it stands still."""
    logits = random_logits(3)
    for _ in range(400):
        logits = logits - 0.3 * mean_gradient(logits, loss, reference) / logits.softmax(-1)
    return logits.softmax(-1)


@pytest.mark.parametrize(
    ("loss", "low", "high"), [(k1_in_reward, 0, 1e-9), (k2_in_loss, 0, 1e-9), (k3_in_loss, 0.02, 1)]
)
def test_where_one_token_policies_end(loss: Loss, low: float, high: float) -> None:
    reference = bandit(random_logits(1))
    best = (reference[:, 0] + REWARDS / BETA).softmax(-1)
    distance = (descend(loss, reference) - best).abs().sum().item() / 2
    assert low <= distance <= high


def test_mean_gradient_of_each_kl_estimator() -> None:
    logits, reference = random_logits(1).requires_grad_(), bandit(random_logits(2))
    k1, k2, k3 = (
        mean_gradient(logits, lambda p, q, estimator=estimator: kl_estimate(p, q, estimator), reference)
        for estimator in ("k1", "k2", "k3")
    )
    logprobs = bandit(logits)
    (forward,) = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    assert reverse.norm() > 0.1 and (reverse - forward).norm() > 0.1
    assert k1.abs().max() < 1e-14
    torch.testing.assert_close(k2, reverse, atol=1e-14, rtol=0)
    torch.testing.assert_close(k3, forward, atol=1e-14, rtol=0)


def test_k1_in_the_loss_does_not_hold_the_policy() -> None:
    logits, reference = random_logits(1), bandit(random_logits(2))
    alone = mean_gradient(logits, lambda logprobs, _: reinforce(logprobs, REWARDS[:, None]), reference)
    torch.testing.assert_close(mean_gradient(logits, k1_in_loss, reference), alone, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("kl", "rests"),
    [
        ({"where": "reward"}, "optimum"),
        ({"where": "loss", "estimator": "k2"}, "tokenwise"),
        ({"where": "loss", "estimator": "k3"}, None),
    ],
)
def test_on_sequences_each_place_has_its_own_fixed_point(kl: dict[str, Any], rests: str | None) -> None:
    start = random_tables(1)
    reference = logprobs_of(start)
    ends = {"optimum": optimum(reference, REWARDS, BETA), "tokenwise": tokenwise(start, REWARDS, BETA)}
    for end, tables in ends.items():
        norm = expected_gradient(config("rloo", BETA, kl=kl), tables, reference, REWARDS, size=2).norm()
        assert norm < 1e-12 if end == rests else norm > 1e-3, end


@pytest.mark.parametrize("normalise", ["group", "batch"])
def test_division_by_a_deviation_removes_the_scale_of_the_reward(normalise: str) -> None:
    tables = random_tables(2)
    reference = logprobs_of(random_tables(1))
    plain, scaled = (
        expected_gradient(config("grpo", 0.0, normalise=normalise), tables, reference, factor * REWARDS, size=2)
        for factor in (1, 100)
    )
    assert plain.norm() > 0.01
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-5)
