"""Losses on comparisons: by hand, against loops, and at the policies they lead to."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from trainers.preferences import bradley_terry_loss, dpo_loss, ipo_loss, kwise_loss, order_share

OUTCOMES = 64
BETA = 0.5


def one(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (bradley_terry_loss(one(1), one(0)), 0.313262),  # ln(1 + 1/e)
        (bradley_terry_loss(one(2), one(0), margin=one(1)), 0.313262),
        (bradley_terry_loss(one(0), one(1)), 1.313262),
        (bradley_terry_loss(one(1), one(0), label=0.8), 0.513262),  # 0.8 * 0.313262 + 0.2 * 1.313262
        (bradley_terry_loss(one(1), one(0), label=0.0), 1.313262),
        (kwise_loss(one(2, 1, 0)[None], torch.ones(1, 3, dtype=torch.bool)), 0.251151),  # (0.313262 * 2 + 0.126928) / 3
        (dpo_loss(one(2), 0.5), 0.313262),
        (dpo_loss(one(2), 0.5, label=0.8), 0.513262),
        (ipo_loss(one(2.5), 0.25), 0.25),  # 1 / (2 * 0.25) = 2
        (ipo_loss(one(2.5), 0.25, label=0.75), 2.25),  # half of that target
        (ipo_loss(one(0), 0.25, label=0.5), 0.0),
    ],
)
def test_a_loss_is_what_is_worked_out_by_hand(loss: Tensor, by_hand: float) -> None:
    assert loss.shape == (1,) and float(loss) == pytest.approx(by_hand, abs=1e-6)


def test_losses_are_those_of_loops() -> None:
    rng = np.random.default_rng(0)
    a, b, margin, label = (torch.tensor(rng.normal(size=20)) for _ in range(4))
    label = label.sigmoid()
    pairs = bradley_terry_loss(a, b, margin=margin, label=label)
    soft = dpo_loss(a, 0.3, label=label)
    squares = ipo_loss(a, 0.3, label=label)
    for i in range(20):
        x, y, m, p = (float(of[i]) for of in (a, b, margin, label))
        assert float(pairs[i]) == pytest.approx(p * softplus(y - x + m) + (1 - p) * softplus(x - y + m))
        assert float(soft[i]) == pytest.approx(p * softplus(-0.3 * x) + (1 - p) * softplus(0.3 * x))
        assert float(squares[i]) == pytest.approx((x - (2 * p - 1) / 0.6) ** 2)


def test_a_ranking_is_the_mean_of_its_pairs_whatever_lies_behind_it() -> None:
    rng = np.random.default_rng(1)
    sizes = [1, 2, 3, 5]
    mask = torch.arange(5) < torch.tensor(sizes)[:, None]
    plain = torch.tensor(rng.normal(size=(4, 5))).masked_fill(~mask, math.nan)
    scores = plain.clone().requires_grad_()
    losses, shares = kwise_loss(scores, mask), order_share(plain, mask)
    for row, size in enumerate(sizes):
        pairs = [(float(plain[row, i]), float(plain[row, j])) for i in range(size) for j in range(i + 1, size)]
        count = max(len(pairs), 1)
        assert losses[row].item() == pytest.approx(sum(softplus(worse - better) for better, worse in pairs) / count)
        assert float(shares[row]) == pytest.approx(sum(better > worse for better, worse in pairs) / count)
    losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad[~mask].eq(0).all() and scores.grad[mask][1:].ne(0).all()


def test_two_in_order_are_a_pair() -> None:
    scores = torch.randn(50, 2, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(50, 2, dtype=torch.bool)
    assert torch.equal(kwise_loss(scores, mask), bradley_terry_loss(scores[:, 0], scores[:, 1]))
    assert order_share(torch.zeros(1, 2), mask[:1]).tolist() == [0.0], "a tie tells nothing apart"


def test_bradley_terry_draws_chosen_and_rejected_apart() -> None:
    """ln 2 where both are equal, and a step downhill raises chosen - rejected.

    Lambert & Calandra 2023 print their eq. 1 with the other sign, log(1 + exp(chosen - rejected)): that has ln 2 there
    too, and its step draws them the wrong way.
    """
    scores = one(0.3, 0.3).requires_grad_()
    loss = bradley_terry_loss(scores[:1], scores[1:])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    loss.sum().backward()
    assert scores.grad is not None
    chosen, rejected = (scores - 0.1 * scores.grad).tolist()
    assert chosen - rejected == pytest.approx(0.1)
    printed = torch.log1p(torch.exp(scores[0] - scores[1]))
    (gradient,) = torch.autograd.grad(printed, scores)
    assert gradient.tolist() == pytest.approx([0.5, -0.5])


def test_a_constant_added_to_all_rewards_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones(20, 4, dtype=torch.bool)
    shift = torch.randn(20, 1, generator=generator, dtype=torch.float64)  # one for each prompt
    torch.testing.assert_close(kwise_loss(scores + shift, mask), kwise_loss(scores, mask), atol=1e-12, rtol=0)
    pairs = bradley_terry_loss(scores[:, 0], scores[:, 1], margin=scores[:, 2])
    moved = bradley_terry_loss(scores[:, 0] + shift[:, 0], scores[:, 1] + shift[:, 0], margin=scores[:, 2])
    torch.testing.assert_close(moved, pairs, atol=1e-12, rtol=0)


def bandit(seed: int) -> tuple[Tensor, Tensor]:
    """Return log start probabilities and rewards of 64 outcomes."""
    generator = torch.Generator().manual_seed(seed)
    logits, rewards = (torch.randn(OUTCOMES, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.log_softmax(0), rewards


def minimiser(start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the log-probs of the softmax policy that minimises `loss` of all pairs' log-ratio differences, by Newton.

    start: log-probs (64,), where it begins too.
    """

    def of_logits(logits: Tensor) -> Tensor:
        ratios = logits.log_softmax(0) - start
        return loss(ratios[:, None] - ratios[None, :]).mean()

    logits = start.clone()
    for _ in range(40):
        gradient = torch.func.grad(of_logits)(logits)
        hessian = torch.func.hessian(of_logits)(logits)
        logits = logits - torch.linalg.pinv(hessian, hermitian=True) @ gradient  # a constant changes nothing
    return logits.log_softmax(0)


def total_variation(a: Tensor, b: Tensor) -> float:
    return float((a.exp() - b.exp()).abs().sum() / 2)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_dpo_with_exact_labels_is_the_optimal_policy(shift: float) -> None:
    """pi* ∝ pi0 exp(r / beta), whatever constant the reward has: Rafailov et al. 2023, eq. 4."""
    start, rewards = bandit(4)
    optimal = (start + rewards / BETA).log_softmax(0)
    assert total_variation(start, optimal) > 0.3
    shifted = rewards + shift
    labels = (shifted[:, None] - shifted[None, :]).sigmoid()
    found = minimiser(start, lambda differences: dpo_loss(differences, BETA, label=labels))
    assert total_variation(found, optimal) < (1e-14 if shift == 0 else 1e-13)  # machine precision, also of the labels


@pytest.mark.parametrize(("beta", "chosen"), [(1.0, 0.75), (0.5, 0.9)])
def test_dpo_of_two_outcomes_by_hand(beta: float, chosen: float) -> None:
    """Rewards ln 3 and 0 from an even start: odds 3^(1/beta), at a difference of ln 3 / beta."""
    difference = one(math.log(3) / beta).requires_grad_()
    (gradient,) = torch.autograd.grad(dpo_loss(difference, beta, label=0.75).sum(), difference)
    assert abs(gradient.item()) < 1e-15
    assert torch.sigmoid(difference).item() == pytest.approx(chosen, abs=1e-15)


def test_ipo_with_exact_labels_is_its_own_closed_form() -> None:
    """pi ∝ pi0 exp(E[p(y > z)] / beta) over z as compared, here uniform: Azar et al. 2023, eq. 7, psi the identity."""
    start, rewards = bandit(5)
    labels = (rewards[:, None] - rewards[None, :]).sigmoid()
    closed = (start + labels.mean(1) / BETA).log_softmax(0)
    found = minimiser(start, lambda differences: ipo_loss(differences, BETA, label=labels))
    assert total_variation(found, closed) < 1e-10
    assert total_variation(closed, (start + rewards / BETA).log_softmax(0)) > 0.05, "which is not that of DPO"


def test_conservative_labels_stop_at_a_finite_difference_and_ipo_without_them() -> None:
    """All labels one way: DPO is pushed on for ever, cDPO rests at log((1 - e) / e) / beta, IPO at 1 / (2 beta)."""
    epsilon = 0.1
    rest = math.log((1 - epsilon) / epsilon) / BETA

    def slope(loss: Callable[[Tensor], Tensor], at: float) -> float:
        difference = one(at).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(difference).sum(), difference)
        return float(gradient)

    assert slope(lambda h: dpo_loss(h, BETA, label=1 - epsilon), rest) == pytest.approx(0, abs=1e-12)
    assert slope(lambda h: dpo_loss(h, BETA), 20 * rest) < 0
    assert slope(lambda h: ipo_loss(h, BETA), 1 / (2 * BETA)) == 0
    mixed = [slope(lambda h, p=p: ipo_loss(h, BETA, label=p), 0.7) for p in (1.0, 0.0)]
    soft = slope(lambda h: ipo_loss(h, BETA, label=1 - epsilon), 0.7)
    assert soft == pytest.approx((1 - epsilon) * mixed[0] + epsilon * mixed[1])
