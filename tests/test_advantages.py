"""Advantages against loops that spell out their definitions."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainers.advantages import (
    best_and_worst,
    best_of_group,
    gae,
    group_advantages,
    leave_one_out,
    overlong_penalty,
    token_rewards,
    whiten,
)

SEEDS = st.integers(0, 10_000)


def ragged(seed: int, rows: int = 5, width: int = 6) -> tuple[torch.Generator, list[int], Tensor]:
    """Completion lengths from 0 to `width`, and their right-padded mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = torch.randint(0, width + 1, (rows,), generator=generator).tolist()
    return generator, lengths, torch.arange(width) < torch.tensor(lengths)[:, None]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.1, 0.25, -1.0, 3.0, 7.5])), min_size=1, max_size=12),
    divide=st.booleans(),
)
def test_group_advantages_against_a_loop(rows: list[tuple[int, float]], divide: bool) -> None:
    got = group_advantages(
        torch.tensor([reward for _, reward in rows], dtype=torch.float64),
        torch.tensor([group for group, _ in rows]),
        divide_by_std=divide,
    )
    for (group, reward), value in zip(rows, got.tolist(), strict=True):
        peers = [other for number, other in rows if number == group]
        if len(set(peers)) == 1:
            assert value == 0
            continue
        expected = reward - statistics.mean(peers)
        if divide:
            expected /= statistics.pstdev(peers) + 1e-6
        assert value == pytest.approx(expected, abs=1e-9)


ROWS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.25, -1.0, 3.0])), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS)
def test_leave_one_out_against_a_loop(rows: list[tuple[int, float]]) -> None:
    got = leave_one_out(
        torch.tensor([reward for _, reward in rows], dtype=torch.float64), torch.tensor([group for group, _ in rows])
    )
    for i, (group, reward) in enumerate(rows):
        others = [other for j, (number, other) in enumerate(rows) if number == group and j != i]
        expected = reward - statistics.mean(others) if others else 0.0
        assert got[i].item() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows=ROWS, number=st.integers(1, 3), usable=st.lists(st.booleans(), min_size=12, max_size=12))
def test_the_best_and_the_worst_of_a_group_against_a_sort(
    rows: list[tuple[int, float]], number: int, usable: list[bool]
) -> None:
    rewards, groups = torch.tensor([reward for _, reward in rows]), torch.tensor([group for group, _ in rows])
    best = best_of_group(rewards, groups, number)
    signs = best_and_worst(rewards, groups, torch.tensor(usable[: len(rows)]))
    for group in {group for group, _ in rows}:
        mine = [i for i, (other, _) in enumerate(rows) if other == group]
        down = sorted(mine, key=lambda i: -rows[i][1])
        differ = len({rows[i][1] for i in mine}) > 1
        assert [i for i in mine if best[i]] == sorted(down[:number] if differ else [])
        mine = [i for i in mine if usable[i]]
        differ = len({rows[i][1] for i in mine}) > 1
        up = sorted(mine, key=lambda i: rows[i][1])
        down = sorted(mine, key=lambda i: -rows[i][1])
        assert [i for i in mine if signs[i] > 0] == down[:differ]
        assert [i for i in mine if signs[i] < 0] == up[:differ]
    assert not signs[~torch.tensor(usable[: len(rows)])].any()


def test_the_overlong_penalty_rises_over_the_last_share() -> None:
    lengths = torch.tensor([0, 79, 80, 81, 90, 100, 120])
    found = overlong_penalty(lengths, 100, share=0.2, penalty=2.0)
    assert found.tolist() == pytest.approx([0, 0, 0, 0.1, 1.0, 2.0, 2.0])


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_group_advantages_have_mean_square_one_for_every_group_size(size: int) -> None:
    rewards = normal(torch.Generator().manual_seed(size), 4 * size)
    got = group_advantages(rewards, torch.arange(4).repeat(size), divide_by_std=True)
    assert got.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_equal_rewards_give_exactly_zero_in_single_precision() -> None:
    rewards = torch.full((7,), 0.1)
    assert (rewards.sum() / 7 != rewards[0]).item(), "rounding must leave a residue, or this tests nothing"
    assert group_advantages(rewards, torch.zeros(7, dtype=torch.long), divide_by_std=True).tolist() == [0.0] * 7


def test_a_nan_reward_stays_visible_and_in_its_group() -> None:
    rewards = torch.tensor([1.0, math.nan, 1.0, 2.0])
    got = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), divide_by_std=False)
    assert got[:2].isnan().all() and got[2:].tolist() == [-0.5, 0.5]


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, coefficient=st.sampled_from([0.0, 0.05, 1.0]), with_kl=st.booleans())
def test_token_rewards_against_a_loop(seed: int, coefficient: float, with_kl: bool) -> None:
    generator, lengths, mask = ragged(seed)
    rewards, kl = normal(generator, 5), normal(generator, 5, 6)
    got = token_rewards(rewards, mask, kl if with_kl else None, coefficient)
    for row, length in enumerate(lengths):
        for t in range(6):
            expected = rewards[row].item() if t == length - 1 else 0.0
            if with_kl and t < length:
                expected -= coefficient * kl[row, t].item()
            assert got[row, t].item() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, gamma=st.sampled_from([0.0, 0.9, 1.0]), lam=st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_against_the_sum_of_equation_16(seed: int, gamma: float, lam: float) -> None:
    generator, lengths, mask = ragged(seed)
    rewards, values = normal(generator, 5, 6), normal(generator, 5, 6)
    values[~mask] = math.nan  # what lies in the padding must not leak
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(6):
            expected = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            value = v[t] if t < length else 0.0
            assert returns[row, t].item() == pytest.approx(expected + value, abs=1e-12)


def test_gae_with_lam_one_is_return_minus_value_and_zero_is_one_step() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[1.0, 5.0, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert gae(rewards, values, mask, gamma=1, lam=1)[0].tolist() == [[2.0, -2.0, 1.0]]
    assert gae(rewards, values, mask, gamma=1, lam=0)[0].tolist() == [[4.0, -3.0, 1.0]]


def test_gae_steps_over_a_masked_token_inside_a_completion() -> None:
    mask = torch.tensor([[True, False, True]])
    rewards, values = torch.tensor([[0.5, 9.0, 2.0]]), torch.tensor([[1.0, 9.0, 4.0]])
    dense = gae(rewards[:, [0, 2]], values[:, [0, 2]], mask[:, [0, 2]], gamma=0.9, lam=0.8)
    holed = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for without, including in zip(dense, holed, strict=True):
        assert including[0, 1] == 0 and torch.equal(including[:, [0, 2]], without)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_whiten_against_a_loop(seed: int) -> None:
    generator, lengths, mask = ragged(seed)
    x = 3 * normal(generator, 5, 6) + 10
    got = whiten(x.masked_fill(~mask, math.nan), mask)
    inside = [x[row, t].item() for row, length in enumerate(lengths) for t in range(length)]
    for row, length in enumerate(lengths):
        for t in range(6):
            expected = 0.0
            if t < length:
                variance = statistics.pvariance(inside)
                expected = (x[row, t].item() - statistics.mean(inside)) / math.sqrt(variance + 1e-8)
            assert got[row, t].item() == pytest.approx(expected, abs=1e-6)


def test_whiten_of_a_constant_or_of_nothing_is_zero() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    assert whiten(torch.full((2, 2), 4.0), mask).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert whiten(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
