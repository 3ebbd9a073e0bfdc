"""From a batch to the loss that is differentiated, worked by hand: targets, losses of tokens, their mean."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs import schema
from configs.algorithms import FACTS
from tests.by_hand import BY_HAND, INPUTS, KL, MASK, batch_of, expected, padded_with, section
from trainers.algorithms import AdvantageOutputs
from trainers.losses import token_weights
from trainers.objective import token_losses
from trainers.targets import RewardShaping, Targets, targets
from trainers.types import Batch

HALF, EIGHTH = math.log(1 / 2), math.log(1 / 8)


def towards(batch: Batch, of: schema.Algorithm, values: Any = None, max_tokens: int = 1000) -> Targets:
    return targets(batch, of, of.kl.coefficient, RewardShaping(config=of, max_tokens=max_tokens), values)


def reduced(batch: Batch, of: schema.Algorithm, logprobs: Tensor, values: Any = None) -> Tensor:
    """The loss of one update on the whole batch, all policies but behaviour and reference being the current one."""
    found = towards(batch, of, values)
    rows = [row for unit in found.units for row in unit]
    loss, _ = token_losses(batch, rows, found, of, of.kl.coefficient, logprobs[rows], logprobs.detach()[rows])
    weights = token_weights(torch.tensor(batch.mask[rows]), of.aggregate, fixed_length=of.fixed_length)
    return (loss * weights).sum()


def four() -> Batch:
    """The batch of `INPUTS`, whose KL is that of behaviour and reference."""
    behaviour = torch.full((4, 2), -2.0, dtype=torch.float64)
    reference = behaviour - torch.where(MASK, KL, torch.zeros(4, 2))
    return batch_of(behaviour, reference, MASK, INPUTS.rewards, INPUTS.groups, INPUTS.greedy)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_batchs_targets_by_hand(name: str) -> None:
    kl = {} if FACTS[name].kl_where == "pairs" else {"where": "reward", "estimator": "k1"}
    of = section(name, kl={"coefficient": 0.5, **kl}, **({"lam": 1.0} if name == "ppo" else {}))
    found = towards(four(), of, np.zeros((4, 2)) if name == "ppo" else None)
    torch.testing.assert_close(found.outputs.advantages.float(), expected(name), atol=1e-5, rtol=0)
    units = {"rft": ((0,), (2,)), "online_dpo": ((0, 1),), "online_ipo": ((0, 1),)}
    assert found.units == units.get(name, ((0,), (1,), (2,), (3,)))


def two() -> tuple[Batch, Tensor]:
    """Two rollouts of one prompt, of two tokens and of one; rewards 1, 0; log-ratios to the reference 1, 0 and -2."""
    logprobs = torch.tensor([[HALF, HALF], [EIGHTH, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    reference = logprobs - torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    return batch_of(logprobs, reference, mask, [1.0, 0.0], greedy=[0.25, 0.25]), logprobs


@pytest.mark.parametrize(
    ("name", "options", "loss"),
    [
        ("grpo", {}, 0.25 / 3),  # advantages ±1, k2 terms 0.25 and 1: (-0.75 - 1 + 2) / 3 tokens
        ("dr_grpo", {"fixed_length": 4}, 0.75 / 4 / 2),  # advantages ±0.5: (-0.25 - 0.5 + 1.5) / 4, of two rollouts
        ("reinforce_pp_baseline", {}, 1.25 / 3),  # ±0.5 whitened: 0.7071, 0.7071, -1.4142, whose sum is 0
        ("gspo", {}, (-0.875 + 2) / 2),  # the mean of each completion, then of both
        ("rloo", {}, 0.5 / 3),  # rewards less the KL 0.5 and 1
        ("remax", {}, -1.25 / 3),  # the same less 0.25
        ("dapo", {}, -1 / 3),  # without a KL term
        ("cispo", {}, (2 * math.log(2) - math.log(8)) / 3),  # -A log π
        ("rft", {}, math.log(2)),  # of the best alone
        ("online_dpo", {}, 0.604825),  # β·Δ = 0.5·(1 + 2), label σ(1)
        ("online_ipo", {}, (3 - (2 * 0.7310586 - 1)) ** 2),
        ("reinforce_pp", {"normalise": "none"}, -2.5 / 3),  # to go 0.5, 1 and 1
        ("ppo", {"normalise": "none"}, -(-0.5 + 0.95 + 1 + 1) / 3),  # the same with lam = 0.95 and a critic that says 0
    ],
)
def test_the_loss_of_a_batch_by_hand(name: str, options: dict[str, Any], loss: float) -> None:
    batch, logprobs = two()
    of = section(name, kl={"coefficient": 0.5}, **options)
    values = np.zeros((2, 2)) if name == "ppo" else None
    assert reduced(batch, of, logprobs, values).item() == pytest.approx(loss, abs=2e-6)


def one_token(current: float, advantage: float, proximal: str, kl: float = 0.0) -> float:
    """The loss of a token that had probability 0.25 when it was sampled and 0.5 before the step."""
    behaviour, now = [[math.log(0.25)]], torch.tensor([[math.log(current)]], dtype=torch.float64)
    batch = batch_of(behaviour, now - 1.0, torch.tensor([[True]]), [0.0])
    of = section("grpo", proximal=proximal, kl={"coefficient": kl, "where": "loss"})
    outputs = AdvantageOutputs(advantages=torch.full((1, 1), advantage, dtype=torch.float64))
    aim = Targets(rewards=torch.zeros(1), outputs=outputs, units=((0,),))
    before = torch.tensor([[math.log(0.5)]], dtype=torch.float64)
    loss, _ = token_losses(batch, [0], aim, of, of.kl.coefficient, now, before)
    return loss.item()


@pytest.mark.parametrize(
    ("proximal", "current", "advantage", "loss"),
    [
        ("recompute", 0.55, 1.0, -2.2),  # the ratio of this step 1.1, the weight of who sampled 2
        ("recompute", 0.7, 1.0, -2.4),  # 1.4 is clipped to 1.2, the weight is not
        ("recompute", 0.3, -1.0, 1.6),  # 0.6 to 0.8
        ("behaviour", 0.55, 1.0, -1.2),  # 2.2 is clipped
        ("behaviour", 0.55, -1.0, 2.2),
        ("behaviour", 0.3, -1.0, 1.2),
    ],
)
def test_behaviour_proximal_and_current_policy_are_three(
    proximal: str, current: float, advantage: float, loss: float
) -> None:
    assert one_token(current, advantage, proximal) == pytest.approx(loss)
    assert one_token(current, advantage, proximal, kl=0.5) == pytest.approx(loss + 0.5)  # 0.5 · 1²/2, by the weight 2


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("what", ["behaviour_logprobs", "reference_logprobs"])
@pytest.mark.parametrize("junk", [math.nan, -100.0])
def test_padding_is_not_looked_at(name: str, what: str, junk: float) -> None:
    batch, logprobs = two()
    values = np.zeros((2, 2)) if name == "ppo" else None
    cases: list[dict[str, Any]] = (
        [{}] if "pairs" in FACTS[name].kl_where or name == "rft" else [{}, {"proximal": "behaviour"}]
    )
    for options in cases:
        of = section(name, kl={"coefficient": 0.5}, fixed_length=9 if name == "dr_grpo" else None, **options)
        found = reduced(padded_with(batch, what, junk), of, logprobs, values)
        assert found.item() == reduced(batch, of, logprobs, values).item()


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused_with_its_sample(name: str, junk: float) -> None:
    batch = replace(four(), rewards=np.array([4.0, 1.0, junk, 2.0]))
    with pytest.raises(FloatingPointError, match="sample s2: its reward is not a finite number"):
        towards(batch, section(name), np.zeros((4, 2)) if name == "ppo" else None)


@pytest.mark.parametrize("name", FACTS)
def test_a_log_prob_of_the_policy_that_is_no_number_is_refused_with_its_sample(name: str) -> None:
    batch, logprobs = two()
    with pytest.raises(FloatingPointError, match="sample s0: its loss is not a finite number"):
        reduced(
            batch,
            section(name, fixed_length=9 if name == "dr_grpo" else None),
            logprobs.index_fill(0, torch.tensor([0]), math.nan),
            np.zeros((2, 2)) if name == "ppo" else None,
        )


def counted(**off_policy: Any) -> dict[str, float]:
    """What is counted of ratios 1.5, 0.25 and 3 in one completion and 0.2 in another, over their four tokens."""
    ratios = torch.tensor([[1.5, 0.25, 3.0], [0.2, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 3, [True, False, False]])
    behaviour = torch.full((2, 3), -3.0, dtype=torch.float64)
    now = torch.where(mask, behaviour + ratios.log(), torch.zeros_like(ratios))
    batch, of = batch_of(behaviour, behaviour, mask, [1.0, 0.0]), section("grpo", off_policy=off_policy)
    _, found = token_losses(batch, [0, 1], towards(batch, of), of, 0.0, now, now)
    return {name: float(value.sum()) for name, value in found.items()}


def test_bounds_are_counted_by_hand() -> None:
    plain = counted(cap=2.0)
    assert plain["weight"] == pytest.approx(1.5 + 0.25 + 2 + 0.2)
    assert plain["weight_squared"] == pytest.approx(2.25 + 0.0625 + 4 + 0.04)
    assert (plain["tokens"], plain["truncated"], plain["masked"]) == (4, 1, 0)
    rejected = counted(cap=2.0, reject_below=0.22)
    assert rejected["weight"] == pytest.approx(3.75) and (rejected["truncated"], rejected["masked"]) == (1, 1)
    masked = counted(weight="mask", cap=2.0, floor=0.22)
    assert masked["weight"] == pytest.approx(1.75) and (masked["truncated"], masked["masked"]) == (0, 2)


@pytest.mark.parametrize(("aggregate", "slope"), [("fixed", 1 / 16), ("token", 1 / 12), ("sequence", 3 / 32)])
def test_what_completions_of_unequal_length_weigh(aggregate: str, slope: float) -> None:
    """A policy says `s` and ends, or says two tokens, the second for sure; only `s` is paid. By sums over all groups.

    Of a group that has both, the first logit's gradient is 1/4 from `s` and 1/4 from the first token of the other:
    together by the length 2 and two rollouts; by three tokens; 1/4 and 1/4 · 1/2 by two rollouts. Half of all groups.
    """
    logit = torch.zeros((), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    of = section("dr_grpo", aggregate=aggregate, fixed_length=2 if aggregate == "fixed" else None)
    of = of.model_copy(update={"kl": of.kl.model_copy(update={"coefficient": 0.0})})
    total = zero
    for ends in [(True, True), (True, False), (False, True), (False, False)]:
        rows = [torch.stack([torch.nn.functional.logsigmoid(logit if end else -logit), zero]) for end in ends]
        logprobs, mask = torch.stack(rows), torch.tensor([[True, not end] for end in ends])
        own = logprobs.detach()
        total = total + reduced(batch_of(own, own, mask, [float(end) for end in ends]), of, logprobs) / 4
    (gradient,) = torch.autograd.grad(-total, logit)
    assert gradient.item() == pytest.approx(slope, abs=1e-8)  # weights are float32


@pytest.mark.parametrize(
    ("options", "max_tokens", "greedy", "advantage"),
    [
        ({"overlong": {"share": 0.2, "penalty": 1.0}}, 2, 0.5, -0.5),  # 1 - 1, and the greedy completion pays nothing
        ({"reward_clip": 2.0}, 1000, 5.0, -1.0),  # it is clipped, too
    ],
)
def test_what_becomes_of_the_greedy_reward(
    options: dict[str, Any], max_tokens: int, greedy: float, advantage: float
) -> None:
    mask = torch.tensor([[True, True]])
    batch = batch_of([[-1.0, -1.0]], [[-1.0, -1.0]], mask, [1.0], greedy=[greedy])
    found = towards(batch, section("remax", **options), max_tokens=max_tokens).outputs.advantages
    assert found[0].tolist() == pytest.approx([advantage] * 2)
