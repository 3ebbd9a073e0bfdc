"""The losses of the table worked by hand, on both sides of every bound and at it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import schema
from configs.algorithms import FACTS
from trainers.algorithms import ALGORITHMS, LossInputs

# One completion a row, two tokens; of the second row the last is padding.
LOGPROBS = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]])
TOKENS = torch.tensor([[True, True], [True, False]])


def losses(name: str, ratios: Any, signs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and whether clipped, for ratios current / proximal of the tokens."""
    section = schema.Algorithm.model_validate({"name": name})
    inputs = LossInputs(
        logprobs=LOGPROBS,
        proximal=LOGPROBS - torch.tensor(ratios).log(),
        advantages=torch.tensor(signs) * TOKENS,
        mask=TOKENS,
        rewards=torch.tensor([math.log(3), 0.0]),
        groups=torch.tensor([0, 0]),
        reference=LOGPROBS - torch.tensor([[0.5, 0.5], [-1.0, 77.0]]),  # log-ratios to it: 1 and -1
        beta=0.5,
        clip_low=options.pop("clip_low", section.clip_low),
        clip_high=options.pop("clip_high", section.clip_high),
        ratio=section.ratio,
        **options,
    )
    found = ALGORITHMS[name].loss(inputs)
    return found.loss, found.clipped & TOKENS


SURROGATES = sorted(name for name in FACTS if name not in ("gspo", "cispo", "rft", "online_dpo", "online_ipo"))


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize(
    ("sign", "ratio", "expected", "clipped"),
    [
        (1.0, 0.5, -0.5, False),
        (1.0, 1.19, -1.19, False),
        (1.0, 1.5, -1.2, True),
        (-1.0, 0.5, 0.8, True),
        (-1.0, 0.81, 0.81, False),
        (-1.0, 1.5, 1.5, False),
    ],
)
def test_the_clipped_surrogate_on_either_side_of_its_bounds(
    name: str, sign: float, ratio: float, expected: float, clipped: bool
) -> None:
    loss, where = losses(name, [[ratio, 1.0], [1.0, 1.0]], [[sign, sign], [sign, sign]], clip_low=0.2, clip_high=0.2)
    assert loss[0, 0].item() == pytest.approx(expected) and loss[0, 1].item() == pytest.approx(-sign)
    assert where.tolist() == [[clipped, False], [False, False]] and loss[1, 1] == 0


def test_clip_higher_is_asymmetric_by_default_in_dapo_only() -> None:
    ratios, plus = [[1.25, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]
    assert losses("dapo", ratios, plus)[0][0, 0].item() == pytest.approx(-1.25)
    assert losses("dapo", [[1.35, 1.0], [1.0, 1.0]], plus)[0][0, 0].item() == pytest.approx(-1.28)
    assert losses("grpo", ratios, plus)[0][0, 0].item() == pytest.approx(-1.2)


def test_dual_clip_bounds_the_loss_of_what_is_bad_and_became_likely() -> None:
    minus = [[-1.0, -1.0], [-2.0, -2.0]]
    loss, clipped = losses("ppo", [[5.0, 2.9], [5.0, 1.0]], minus, dual_clip=3.0)
    assert loss[0].tolist() == pytest.approx([3.0, 2.9]) and loss[1, 0].item() == pytest.approx(6.0)
    assert clipped.tolist() == [[True, False], [True, False]]
    good, _ = losses("ppo", [[0.1, 0.1], [0.1, 0.1]], [[1.0, 1.0], [1.0, 1.0]], dual_clip=3.0)
    assert good[0].tolist() == pytest.approx([-0.1, -0.1]), "only negative advantages are bounded"


def test_gspo_clips_whole_completions_by_the_geometric_mean() -> None:
    plus = [[1.0, 1.0], [1.0, 1.0]]
    loss, clipped = losses("gspo", [[0.5, 2.0], [1.0003, 50.0]], plus)
    assert loss[0].tolist() == pytest.approx([-1.0, -1.0]) and loss[1, 0].item() == pytest.approx(-1.0003)
    loss, clipped = losses("gspo", [[1.0, 2.0], [1.001, 50.0]], plus)  # sqrt(2), and 1.001: both above 1.0004
    assert loss[0].tolist() == pytest.approx([-1.0004, -1.0004]) and loss[1, 0].item() == pytest.approx(-1.0004)
    assert clipped.tolist() == [[True, True], [True, False]]


def test_gspos_lower_bound_and_gradient_are_of_the_completion() -> None:
    minus, plus = [[-1.0, -1.0], [-1.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]]
    loss, clipped = losses("gspo", [[0.999, 0.9998], [0.9998, 1.0]], minus)  # sqrt(0.999 · 0.9998) = 0.9994
    assert loss[0].tolist() == pytest.approx([0.9997, 0.9997]) and clipped[0].tolist() == [True, True]
    assert loss[1, 0].item() == pytest.approx(0.9998) and not clipped[1].any()
    logprobs = LOGPROBS.clone().requires_grad_()
    inputs = LossInputs(
        logprobs=logprobs,
        proximal=LOGPROBS - torch.tensor([[0.5, 2.0], [1.0, 1.0]]).log(),
        advantages=torch.tensor(plus),
        mask=TOKENS,
        rewards=torch.zeros(2),
        groups=torch.zeros(2),
        ratio="sequence",
    )
    (gradient,) = torch.autograd.grad(ALGORITHMS["gspo"].loss(inputs).loss[0].sum(), logprobs)
    assert gradient[0].tolist() == pytest.approx([-1.0, -1.0]), "of tokens it would be -0.5 and -2"


def test_cispo_is_free_up_to_five_times_and_below() -> None:
    loss, clipped = losses("cispo", [[4.9, 0.01], [5.1, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(loss[0], torch.tensor([4.9, 0.02]))
    assert loss[1, 0].item() == pytest.approx(2.5) and clipped.tolist() == [[False, False], [True, False]]


def test_cispo_keeps_the_gradient_of_what_it_clips() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    inputs = LossInputs(
        logprobs=logprobs,
        proximal=LOGPROBS - torch.tensor([[1.5, 0.1], [1.0, 1.0]]).log(),
        advantages=torch.tensor([[2.0, 2.0], [-1.0, 0.0]]),
        mask=TOKENS,
        rewards=torch.zeros(2),
        groups=torch.zeros(2),
        clip_low=1.0,
        clip_high=0.2,
    )
    found = ALGORITHMS["cispo"].loss(inputs)
    # -A · min(ratio, 1.2) · log-prob; nothing is limited from below.
    torch.testing.assert_close(found.loss.detach(), torch.tensor([[2.4, 0.4], [-0.5, 0.0]]))
    (gradient,) = torch.autograd.grad(found.loss.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-2.4, -0.2], [1.0, 0.0]]))
    assert found.clipped.tolist() == [[True, False], [False, False]]


def test_rft_imitates() -> None:
    loss, clipped = losses("rft", [[5.0, 5.0], [5.0, 5.0]], [[1.0, 1.0], [0.0, 0.0]])
    assert loss.tolist() == [[1.0, 2.0], [0.0, 0.0]] and not clipped.any()


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        # β · (1 - -1) = 1; the label σ(ln 3) = 0.75: 0.75·ln(1 + e⁻¹) + 0.25·ln(1 + e)
        ("online_dpo", "bradley_terry", 0.563262),
        ("online_dpo", "hard", 0.313262),
        # log-ratio 2 against (2 · 0.75 - 1) / (2 · 0.5) = 0.5, and against 1
        ("online_ipo", "bradley_terry", 2.25),
        ("online_ipo", "hard", 1.0),
    ],
)
def test_the_loss_of_a_pair_stands_at_every_token_of_both(name: str, labels: str, expected: float) -> None:
    loss, clipped = losses(name, [[5.0, 5.0], [5.0, 5.0]], [[1.0, 1.0], [-1.0, -1.0]], labels=labels)
    torch.testing.assert_close(loss, torch.tensor([[expected, expected], [expected, 0.0]]), atol=1e-5, rtol=0)
    assert not clipped.any()


def test_pairs_find_each_other_in_any_order_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = LossInputs(
        logprobs=torch.randn(6, 3, generator=generator),
        proximal=torch.zeros(6, 3),
        advantages=torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])[:, None].expand(-1, 3),
        mask=torch.ones(6, 3, dtype=torch.bool),
        rewards=torch.randn(6, generator=generator),
        groups=torch.tensor([7, 7, 2, 2, 4, 4]),
        reference=torch.randn(6, 3, generator=generator),
        beta=0.3,
    )
    order = torch.tensor([4, 1, 3, 0, 5, 2])
    per_row = ("logprobs", "proximal", "advantages", "mask", "rewards", "groups", "reference")
    moved = replace(inputs, **{name: getattr(inputs, name)[order] for name in per_row})
    for name in ("online_dpo", "online_ipo"):
        torch.testing.assert_close(ALGORITHMS[name].loss(moved).loss, ALGORITHMS[name].loss(inputs).loss[order])
