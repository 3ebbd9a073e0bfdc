"""Losses against loops that spell out their definitions."""

import math
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainers.kl import adapt
from trainers.losses import (
    clipped_surrogate,
    clipped_value_loss,
    clipped_weight_surrogate,
    kl_estimate,
    kl_of_stale,
    token_weights,
)

Estimator = Literal["k1", "k2", "k3"]
Aggregate = Literal["token", "sequence", "fixed"]
SEEDS = st.integers(0, 10_000)
SHAPE = (4, 5)


def normals(seed: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(number)]


def cells() -> list[tuple[int, int]]:
    return [(row, t) for row in range(SHAPE[0]) for t in range(SHAPE[1])]


def ragged_mask(seed: int) -> tuple[list[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = torch.randint(0, SHAPE[1] + 1, (SHAPE[0],), generator=generator).tolist()
    return lengths, torch.arange(SHAPE[1]) < torch.tensor(lengths)[:, None]


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, estimator=st.sampled_from(get_args(Estimator)))
def test_kl_estimate_against_a_loop(seed: int, estimator: Estimator) -> None:
    logprobs, reference = normals(seed, 2)
    got = kl_estimate(logprobs, reference, estimator)
    for cell in cells():
        p, q = math.exp(logprobs[cell].item()), math.exp(reference[cell].item())
        expected = {"k1": math.log(p / q), "k2": math.log(q / p) ** 2 / 2, "k3": q / p - 1 - math.log(q / p)}
        assert got[cell].item() == pytest.approx(expected[estimator], abs=1e-9)


def test_k3_keeps_its_precision_near_zero() -> None:
    got = kl_estimate(torch.tensor([[-1.0 + 2**-10]]), torch.tensor([[-1.0]]), "k3")
    assert got.item() == pytest.approx((2**-10) ** 2 / 2, rel=1e-2)


def test_the_kl_of_stale_tokens_is_that_of_the_policy_whoever_sampled() -> None:
    scores = normals(3, 3)
    policy, reference, behaviour = (each.log_softmax(1) for each in scores)  # (4, 5): four states of five tokens
    exact = (policy.exp() * (policy - reference)).sum(1)
    for sampler in (behaviour, policy):
        torch.testing.assert_close((sampler.exp() * kl_of_stale(policy, reference, sampler)).sum(1), exact)
    naive = (behaviour.exp() * kl_estimate(policy, reference, "k3")).sum(1)
    assert float((naive - exact).abs().max()) > 0.1
    torch.testing.assert_close(kl_of_stale(policy, reference, policy), kl_estimate(policy, reference, "k3"))
    # A token that the policy has unlearned since: k3 alone says e^30, and both terms of it would overflow in fp32.
    gone = kl_of_stale(*(torch.tensor([[x]]) for x in (-120.0, -1.0, -0.5)))
    assert float(gone) == pytest.approx(math.exp(-0.5), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, low=st.sampled_from([0.1, 0.2]), high=st.sampled_from([0.2, 0.5]), dual=st.sampled_from([None, 1.5]))
def test_clipped_surrogate_against_a_loop(seed: int, low: float, high: float, dual: float | None) -> None:
    log_ratio, advantages = normals(seed, 2)
    log_ratio = (0.4 * log_ratio).requires_grad_()
    loss, clipped = clipped_surrogate(log_ratio, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    for cell in cells():
        ratio, advantage = math.exp(log_ratio[cell].item()), advantages[cell].item()
        limited = min(max(ratio, 1 - low), 1 + high)
        objective = min(ratio * advantage, limited * advantage)
        outside = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        if dual is not None and advantage < 0 and objective < dual * advantage:
            objective, outside = dual * advantage, True
        assert loss[cell].item() == pytest.approx(-objective)
        assert clipped[cell].item() == outside
        assert gradient[cell].item() == pytest.approx(0.0 if outside else -ratio * advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "clipped"),
    [
        (2.0, 1.0, None, -2.0, False),  # the bounds are 0.5 and 2, and inside
        (2.01, 1.0, None, -2.0, True),
        (0.5, -1.0, None, 0.5, False),
        (0.49, -1.0, None, 0.5, True),
        (9.0, 0.0, None, 0.0, False),
        (4.0, -2.0, 4.0, 8.0, False),
        (4.01, -2.0, 4.0, 8.0, True),
    ],
)
def test_the_bounds_of_the_surrogate_are_inside(
    ratio: float, advantage: float, dual: float | None, loss: float, clipped: bool
) -> None:
    log_ratio, advantages = torch.tensor([[ratio], [advantage]], dtype=torch.float64)
    got, where = clipped_surrogate(log_ratio.log(), advantages, clip_low=0.5, clip_high=1.0, dual_clip=dual)
    assert got.item() == pytest.approx(loss) and where.item() is clipped


@pytest.mark.parametrize(("ratio", "clipped"), [(2.0, False), (2.01, True), (0.5, False), (0.49, True)])
def test_the_bounds_of_the_weight_are_inside(ratio: float, clipped: bool) -> None:
    one, log_ratio = torch.ones(1, dtype=torch.float64), torch.tensor([ratio], dtype=torch.float64).log()
    assert clipped_weight_surrogate(one, log_ratio, one, clip_low=0.5, clip_high=1.0)[1].item() is clipped


@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.2), (0.0, 0.0)])
def test_a_ratio_that_overflows_neither_teaches_nor_poisons(advantage: float, loss: float) -> None:
    log_ratio = torch.tensor([100.0], requires_grad=True)  # e^100 is no float32
    got, _ = clipped_surrogate(log_ratio, torch.tensor([advantage]), clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(got.sum(), log_ratio)
    assert got.item() == pytest.approx(loss) and gradient.item() == 0


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_clipped_weight_surrogate_against_a_loop(seed: int) -> None:
    logprobs, log_ratio, advantages = normals(seed, 3)
    logprobs.requires_grad_()
    loss, clipped = clipped_weight_surrogate(logprobs, log_ratio, advantages, clip_low=0.3, clip_high=0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    for cell in cells():
        ratio = math.exp(log_ratio[cell].item())
        weight = min(max(ratio, 0.7), 1.5)
        assert loss[cell].item() == pytest.approx(-advantages[cell].item() * weight * logprobs[cell].item())
        assert gradient[cell].item() == pytest.approx(-advantages[cell].item() * weight)
        assert clipped[cell].item() == (not 0.7 <= ratio <= 1.5)


def test_surrogate_has_the_gradient_of_reinforce_on_policy() -> None:
    logits, advantages = torch.randn(4, 5, 7, dtype=torch.float64, requires_grad=True), normals(0, 1)[0]
    logprobs = logits.log_softmax(-1)[..., 2]
    loss, clipped = clipped_surrogate(logprobs - logprobs.detach(), advantages, clip_low=0.2, clip_high=0.2)
    (got,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((-advantages * logprobs).sum(), logits)
    assert torch.allclose(got, expected, atol=1e-14) and not clipped.any()


@pytest.mark.parametrize(
    ("value", "target", "clip", "loss"),
    [
        (3.0, 4.0, 0.5, 3.125),  # the old value 1: kept at 1.5, which is 2.5 off
        (3.0, 1.2, 0.5, 1.62),  # 1.8 off itself, kept it would be 0.3 off
        (1.5, 4.0, 0.5, 3.125),  # at the bound
        (3.0, 4.0, None, 0.5),
    ],
)
def test_clipped_value_loss_by_hand(value: float, target: float, clip: float | None, loss: float) -> None:
    new, old, returns = torch.tensor([[value], [1.0], [target]])
    assert clipped_value_loss(new, old, returns, clip=clip).item() == pytest.approx(loss)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, clip=st.sampled_from([None, 0.2, 1.0]))
def test_clipped_value_loss_against_a_loop(seed: int, clip: float | None) -> None:
    values, old, returns = normals(seed, 3)
    got = clipped_value_loss(values, old, returns, clip=clip)
    for cell in cells():
        value, before, target = values[cell].item(), old[cell].item(), returns[cell].item()
        expected = (value - target) ** 2
        if clip is not None:
            expected = max(expected, (min(max(value, before - clip), before + clip) - target) ** 2)
        assert got[cell].item() == pytest.approx(expected / 2)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, aggregate=st.sampled_from(get_args(Aggregate)), cut=st.integers(0, SHAPE[0]))
def test_token_weights_give_the_mean_however_rows_are_divided(seed: int, aggregate: Aggregate, cut: int) -> None:
    lengths, mask = ragged_mask(seed)
    loss = normals(seed, 1)[0]
    rows = [loss[row, :length].tolist() for row, length in enumerate(lengths)]
    if aggregate == "token":
        expected = sum(map(sum, rows)) / max(sum(lengths), 1)
    elif aggregate == "fixed":
        expected = sum(map(sum, rows)) / 7 / len(rows)
    else:
        expected = sum(sum(row) / len(row) for row in rows if row) / len(rows)
    weights = token_weights(mask, aggregate, fixed_length=7)
    assert not weights[~mask].any()
    parts = [(loss[part] * weights[part]).sum().item() for part in (slice(cut), slice(cut, None))]
    assert sum(parts) == pytest.approx(expected, abs=1e-6)


def test_a_fixed_length_is_needed_for_its_mean() -> None:
    with pytest.raises(ValueError, match="fixed_length"):
        token_weights(torch.ones(2, 3, dtype=torch.bool), "fixed")


@pytest.mark.parametrize(
    ("observed", "expected"),
    [(6.0, 0.05), (6.6, 0.0505), (60.0, 0.051), (5.4, 0.0495), (0.0, 0.049), (-3.0, 0.049)],
)
def test_adapt_is_proportional_within_twenty_percent(observed: float, expected: float) -> None:
    assert adapt(0.05, observed, 6.0, horizon=1000, samples=100) == pytest.approx(expected)


def test_adapt_stays_positive_when_a_step_is_longer_than_the_horizon() -> None:
    assert adapt(0.05, 0.0, 6.0, horizon=10, samples=1000) == pytest.approx(0.04)


def test_adapt_brings_the_kl_to_its_target() -> None:
    coefficient = 5.0
    for _ in range(400):  # a policy whose KL falls with the coefficient
        coefficient = adapt(coefficient, 1 / coefficient, target=2.0, horizon=1000, samples=200)
    assert 1 / coefficient == pytest.approx(2.0, rel=1e-3)
