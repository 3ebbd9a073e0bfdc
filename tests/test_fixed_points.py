"""Which policy each algorithm leads to, by exact expectations over all groups of an enumerable language model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.algorithms import FACTS
from tests.enumerable import (
    GOLD,
    LENGTH,
    PROXY,
    REWARDS,
    SEQUENCES,
    TOKENS,
    Tables,
    config,
    exact_gradient,
    expected_gradient,
    logprobs_of,
    one_thread,
    optimum,
    random_tables,
    tables_of,
    tokenwise,
)

__all__ = ["one_thread"]
BETA = 0.5
START = random_tables(1)
REFERENCE = logprobs_of(START)
AWAY = random_tables(2)
REACH_OPTIMUM = ("rloo", "reinforce_pp", "remax", "ppo", "online_dpo")
REST_TOKENWISE = ("grpo", "dr_grpo", "reinforce_pp_baseline", "gspo")
WITHOUT_KL = ("dapo", "cispo", "rft")


def test_every_algorithm_is_tested_here() -> None:
    assert {*REACH_OPTIMUM, *REST_TOKENWISE, *WITHOUT_KL, "online_ipo"} == FACTS.keys()


def gradient(name: str, tables: Tables, *, size: int = 2, beta: float = BETA, **options: Any) -> Tensor:
    values = later(tables, beta) if name == "ppo" else None
    return expected_gradient(config(name, beta, **options), tables, REFERENCE, REWARDS, size=size, values=values)


def later(tables: Tables, beta: float) -> Tensor:
    """The exact value (64, 3) of the state before each token, of r - β·KL."""
    logprobs = logprobs_of(tables).detach()
    probability = logprobs.sum(1).exp()
    to_go = REWARDS[:, None] - beta * (logprobs - REFERENCE).flip(1).cumsum(1).flip(1)
    prefix = torch.stack([SEQUENCES[:, :t] @ TOKENS ** torch.arange(t).flip(0) for t in range(LENGTH)], 1)
    values = torch.zeros_like(to_go)
    for t in range(LENGTH):
        weight, total = (torch.zeros(TOKENS**t, dtype=torch.float64) for _ in range(2))
        weight.index_add_(0, prefix[:, t], probability)
        total.index_add_(0, prefix[:, t], probability * to_go[:, t])
        values[:, t] = (total / weight)[prefix[:, t]]
    return values


@pytest.mark.parametrize("name", REACH_OPTIMUM)
def test_rests_at_the_optimum_and_nowhere_near(name: str) -> None:
    best = optimum(REFERENCE, REWARDS, BETA)
    assert gradient(name, best).norm() < 1e-9
    assert gradient(name, AWAY).norm() > 1e-2
    assert gradient(name, best, beta=2 * BETA).norm() > 1e-3


@pytest.mark.parametrize("name", REACH_OPTIMUM)
def test_approaches_the_optimum(name: str) -> None:
    beta, tables = 1.0, AWAY
    goal = logprobs_of(optimum(REFERENCE, REWARDS, beta)).sum(1).exp()
    distances = []
    for k in range(60):  # whitened advantages do not shrink near the optimum: the steps must
        distances.append(float((logprobs_of(tables).sum(1).exp() - goal).abs().sum() / 2))
        tables = ascend(name, tables, beta, rate=0.5 / (1 + 0.1 * k))
    assert distances[-1] < 0.05 < 0.2 < distances[0], distances


def ascend(name: str, tables: Tables, beta: float, rate: float = 0.5, **options: Any) -> Tables:
    """One natural-gradient step: of each state's logits, by the inverse of its action probabilities and visits."""
    step = gradient(name, tables, beta=beta, **options)
    probability = logprobs_of(tables).sum(1).exp()
    moved, start = [], 0
    for t, table in enumerate(tables):
        visits = probability.reshape(TOKENS**t, TOKENS, -1).sum(-1)  # (prefixes, 4): P(prefix, action)
        moved.append(table + rate * step[start : start + table.numel()].reshape(table.shape) / visits)
        start += table.numel()
    return moved


def worth(name: str, logprobs: Tensor) -> Tensor:
    """Mean advantage (64,) of each completion when the other of its group of two is drawn from the policy.

    In closed form: of two, each lies half their difference from the mean, and that is their deviation too.
    """
    probability = logprobs.sum(1).exp()
    half = (REWARDS[:, None] - REWARDS[None]) / 2  # (64, 64)
    if name in ("grpo", "gspo"):
        half = half / (half.abs() + 1e-6)
    if name == "reinforce_pp_baseline":  # the deviation over all groups alike
        half = half / (half.square().mean() + 1e-8).sqrt()
    return half @ probability


@pytest.mark.parametrize("name", REST_TOKENWISE)
def test_rests_where_every_token_is_weighed_by_its_mean_advantage(name: str) -> None:
    beta = 1.0
    tables = START
    for _ in range(200):  # the mean advantage depends on the policy
        tables = tokenwise(START, worth(name, logprobs_of(tables)), beta)
    assert gradient(name, tables, beta=beta).norm() < 1e-9
    assert gradient(name, AWAY, beta=beta).norm() > 1e-2


def test_the_stated_fixed_point_of_the_mean_baseline_is_that_of_its_mean_advantage() -> None:
    stated = tokenwise(START, REWARDS, BETA * 2)  # (n - 1) / n = 1 / 2 for groups of two
    assert gradient("dr_grpo", stated).norm() < 1e-12
    assert gradient("dr_grpo", tokenwise(START, REWARDS, BETA)).norm() > 1e-2


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_with_a_kl_term_it_rests_where_grpo_does(name: str) -> None:
    options = {"kl": {"where": "loss"}}
    tables = START
    for _ in range(200):
        tables = tokenwise(START, worth("grpo", logprobs_of(tables)), 1.0)
    assert gradient(name, tables, beta=1.0, **options).norm() < 1e-9


@pytest.mark.parametrize("name", WITHOUT_KL)
def test_without_a_kl_term_only_the_best_completion_is_left(name: str) -> None:
    tables = START
    before = logprobs_of(tables).sum(1).exp()
    for _ in range(150):
        tables = [table.clamp(-30, 30) for table in ascend(name, tables, 0.0, rate=0.4)]
    after = logprobs_of(tables).sum(1).exp()
    assert before[REWARDS.argmax()] < 0.2 and after[REWARDS.argmax()] > 0.9


def test_imitation_of_the_best_with_the_kl_in_the_reward_comes_near_the_optimum() -> None:
    tables, beta = START, 1.0
    goal = logprobs_of(optimum(REFERENCE, REWARDS, beta)).sum(1).exp()
    distances = []
    for k in range(60):  # its step does not shrink near the optimum: whoever is best by a hair is imitated
        distances.append(float((logprobs_of(tables).sum(1).exp() - goal).abs().sum() / 2))
        tables = ascend("rft", tables, beta, rate=0.3 / (1 + 0.2 * k), kl={"where": "reward"})
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize("size", [2, 3])
def test_pairs_of_any_group_agree_on_the_optimum_because_their_labels_do(size: int) -> None:
    best = optimum(REFERENCE, REWARDS, BETA)
    elsewhere = logprobs_of(random_tables(3))  # whoever samples: the gradient of each pair vanishes alone
    soft, hard = (config("online_dpo", BETA, pair_labels=labels) for labels in ("bradley_terry", "hard"))
    of = {"size": size, "sampled_from": elsewhere}
    assert expected_gradient(soft, best, REFERENCE, REWARDS, **of).abs().max() < 1e-12
    assert expected_gradient(hard, best, REFERENCE, REWARDS, **of).norm() > 1e-3


def test_online_ipo_rests_where_preferences_are_worth_their_mean() -> None:
    beta, logprobs = 1.0, REFERENCE
    preferred = torch.sigmoid(REWARDS[:, None] - REWARDS[None])  # (64, 64)
    for _ in range(200):
        probability = logprobs.sum(1).exp()
        logprobs = logprobs_of(tables_of((REFERENCE.sum(1) + preferred @ probability / beta).log_softmax(0)))
    tables = tables_of(logprobs.sum(1))
    assert gradient("online_ipo", tables, beta=beta).norm() < 1e-9
    assert gradient("online_ipo", optimum(REFERENCE, REWARDS, beta), beta=beta).norm() > 1e-3


@pytest.mark.parametrize("name", ["rloo", "remax"])
def test_the_mean_gradient_is_the_exact_one(name: str) -> None:
    """Of E[r] - β·KL, KL in the reward."""
    exact = exact_gradient(AWAY, REWARDS, REFERENCE, BETA)
    torch.testing.assert_close(gradient(name, AWAY), exact, atol=1e-12, rtol=0)


def test_the_critics_and_the_plain_return_have_the_exact_gradient_too() -> None:
    exact = exact_gradient(AWAY, REWARDS, REFERENCE, BETA)
    for name in ("ppo", "reinforce_pp"):
        found = gradient(name, AWAY, normalise="none")
        torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)
    knows_nothing = expected_gradient(config("ppo", BETA, normalise="none"), AWAY, REFERENCE, REWARDS, size=2)
    torch.testing.assert_close(knows_nothing, exact, atol=1e-12, rtol=0)  # lam = 1


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_that_holds_the_rollout_itself_shrinks_the_gradient(size: int) -> None:
    exact = exact_gradient(AWAY, REWARDS)
    found = gradient("dr_grpo", AWAY, size=size, beta=0.0)
    torch.testing.assert_close(found, exact * (size - 1) / size, atol=1e-12, rtol=0)


def climb(proxy: Tensor, gold: Tensor, beta: float, steps: int) -> list[tuple[float, float, float]]:
    """KL, proxy and gold along natural-gradient ascent on the proxy."""
    tables, curve = START, []
    for _ in range(steps):
        logprobs = logprobs_of(tables).sum(1)
        probability = logprobs.exp()
        kl = float((probability * (logprobs - REFERENCE.sum(1))).sum())
        curve.append((kl, float(probability @ proxy), float(probability @ gold)))
        step = expected_gradient(config("rloo", beta), tables, REFERENCE, proxy, size=2)
        start = 0
        moved = []
        for t, table in enumerate(tables):
            visits = probability.reshape(TOKENS**t, TOKENS, -1).sum(-1)
            moved.append(
                (table + 0.3 * step[start : start + table.numel()].reshape(table.shape) / visits).clamp(-30, 30)
            )
            start += table.numel()
        tables = moved
    return curve


def test_a_misspecified_proxy_is_over_optimised() -> None:
    kl, proxy, gold = (torch.tensor(column) for column in zip(*climb(PROXY, GOLD, 0.02, 40), strict=True))
    assert (proxy.diff() > -1e-6).all() and (kl.diff()[:10] > 0).all()
    peak = int(gold.argmax())
    assert 0 < peak < len(gold) - 1
    assert gold[peak] > gold[0] + 0.1 and gold[peak] > gold[-1] + 0.1
    held = torch.tensor([row[2] for row in climb(PROXY, GOLD, 0.5, 40)])
    assert held[-1] > gold[-1] + 0.1 and (held.diff() > -1e-6).all(), "a stronger KL term stops before the fall"


def test_gold_that_is_the_proxy_is_not() -> None:
    gold = torch.tensor([row[2] for row in climb(PROXY, PROXY, 0.02, 40)])
    assert (gold.diff() > -1e-6).all()
