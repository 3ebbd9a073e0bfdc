"""Off-policy truth: importance weights against loops, their bounds, and which of them make a stale gradient right."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.enumerable import (
    REWARDS,
    Tables,
    config,
    exact_gradient,
    expected_gradient,
    logprobs_of,
    one_thread,
    random_tables,
)
from trainers.importance import effective_share, importance_weights, level_log_ratio

__all__ = ["one_thread"]
SEEDS = st.integers(0, 10_000)
OPEN = {"weight": "truncate", "cap": 1e9}


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = torch.randint(0, 5, (4,), generator=generator).tolist()
    proximal, behaviour = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    return proximal, behaviour, torch.arange(4) < torch.tensor(lengths)[:, None], lengths


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    weight=st.sampled_from(["none", "truncate", "mask"]),
    level=st.sampled_from(["token", "sequence", "geometric"]),
    cap=st.sampled_from([0.5, 1.0, 2.0]),
    reject=st.sampled_from([None, 0.2]),
)
def test_weights_against_a_loop(seed: int, weight: Any, level: Any, cap: float, reject: float | None) -> None:
    proximal, behaviour, mask, lengths = drawn(seed)
    got = importance_weights(
        proximal.requires_grad_(), behaviour, mask, weight=weight, level=level, cap=cap, floor=0.3, reject_below=reject
    )
    assert not got.weights.requires_grad
    for row, length in enumerate(lengths):
        logs = (proximal - behaviour)[row, :length].tolist()
        rejected = reject is not None and any(math.exp(log) < reject for log in logs)
        for t in range(4):
            of = {"token": logs[t] if t < length else 0, "sequence": sum(logs), "geometric": sum(logs) / max(length, 1)}
            ratio = math.exp(of[level])
            out = weight == "mask" and not 0.3 <= ratio <= cap
            expected = 0.0 if t >= length or out or rejected else 1.0 if weight == "none" else min(ratio, cap)
            assert got.weights[row, t].item() == pytest.approx(expected)
            assert got.masked[row, t].item() == (t < length and (out or rejected))
            cut = t < length and weight == "truncate" and ratio > cap and not rejected
            assert got.truncated[row, t].item() == cut


@pytest.mark.parametrize(("ratio", "weight", "masked"), [(2.0, 2.0, False), (2.001, 0.0, True), (0.5, 0.5, False)])
def test_the_bounds_themselves_are_inside(ratio: float, weight: float, masked: bool) -> None:
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    mask = torch.tensor([[True]])
    got = importance_weights(log_ratio, torch.zeros(1, 1), mask, weight="mask", level="token", cap=2.0, floor=0.5)
    assert got.weights.item() == pytest.approx(weight) and got.masked.item() is masked


@pytest.mark.parametrize(
    ("options", "weights", "masked"),
    [
        ({"weight": "truncate", "level": "token"}, [2.0, 0.25, 2.0], [False] * 3),  # the ratios 2, 0.25 and 3
        ({"weight": "truncate", "level": "sequence"}, [1.5] * 3, [False] * 3),
        ({"weight": "truncate", "level": "geometric"}, [1.5 ** (1 / 3)] * 3, [False] * 3),
        ({"weight": "mask", "level": "token", "floor": 0.25}, [2.0, 0.25, 0.0], [False, False, True]),
        ({"weight": "mask", "level": "token", "floor": 0.26}, [2.0, 0.0, 0.0], [False, True, True]),
        ({"weight": "mask", "level": "sequence", "floor": 1.6}, [0.0] * 3, [True] * 3),
        ({"weight": "mask", "level": "geometric", "floor": 1.1}, [1.5 ** (1 / 3)] * 3, [False] * 3),
        ({"weight": "truncate", "level": "token", "reject_below": 0.25}, [2.0, 0.25, 2.0], [False] * 3),
        ({"weight": "truncate", "level": "token", "reject_below": 0.26}, [0.0] * 3, [True] * 3),
    ],
)
def test_one_completion_by_hand(options: dict[str, Any], weights: list[float], masked: list[bool]) -> None:
    logs = torch.tensor([[math.log(2), math.log(0.25), math.log(3)]], dtype=torch.float64)
    got = importance_weights(logs, torch.zeros_like(logs), torch.ones(1, 3, dtype=torch.bool), cap=2.0, **options)
    assert got.weights[0].tolist() == pytest.approx(weights) and got.masked[0].tolist() == masked
    cut = options["weight"] == "truncate" and options["level"] == "token" and not any(masked)
    assert got.truncated[0].tolist() == [False, False, cut], "at the cap is not above it"


def test_weights_do_not_overflow() -> None:
    behaviour = torch.full((1, 3), -1e4)
    for level in ("token", "sequence", "geometric"):
        got = importance_weights(
            torch.zeros(1, 3), behaviour, torch.ones(1, 3, dtype=torch.bool), weight="truncate", level=level, cap=2.0
        )
        assert got.weights[0].tolist() == pytest.approx([2.0, 2.0, 2.0]) and got.truncated.all()


def test_an_empty_completion_and_padding_have_no_weight() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    junk = torch.tensor([[0.0, math.inf], [math.nan, math.nan]])
    for level in ("token", "sequence", "geometric"):
        assert level_log_ratio(junk, mask, level).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_effective_share() -> None:
    assert effective_share(4.0, 4.0, 4.0) == 1.0
    assert effective_share(1.0, 1.0, 4.0) == 0.25, "one weight of four carries all"
    assert effective_share(0.0, 0.0, 4.0) == 0.0


def stale(now: Tables, then: Tables, name: str = "rloo", **off_policy: Any) -> torch.Tensor:
    """The mean gradient on completions that an older policy sampled, without a KL term."""
    of = config(name, 0.0, off_policy=off_policy)
    return expected_gradient(of, now, logprobs_of(now), REWARDS, size=2, sampled_from=logprobs_of(then))


def versions(seed: int, age: int) -> tuple[Tables, Tables]:
    """A policy, and what it was `age` steps of a random walk ago."""
    now = random_tables(seed)
    steps = [random_tables(1000 * seed + step, scale=0.25) for step in range(age)]
    return now, [table - sum(step[t] for step in steps) for t, table in enumerate(now)]


@pytest.mark.parametrize("age", [1, 2, 4, 8])
def test_only_the_weight_of_the_whole_completion_makes_a_stale_gradient_exact(age: int) -> None:
    errors: dict[str, list[float]] = {"sequence": [], "token": [], "geometric": [], "rejecting": [], "none": []}
    for seed in range(1, 6):
        now, then = versions(seed, age)
        exact = exact_gradient(now, REWARDS)
        for level, found in {
            "sequence": stale(now, then, level="sequence", **OPEN),
            "token": stale(now, then, level="token", **OPEN),
            "geometric": stale(now, then, level="geometric", **OPEN),
            "rejecting": stale(now, then, level="sequence", reject_below=0.9, **OPEN),
            "none": stale(now, then, weight="none"),
        }.items():
            errors[level].append(float((found - exact).norm() / exact.norm()))
    assert max(errors["sequence"]) < 1e-12
    assert min(errors["none"]) > 0.02, "what is stale and uncorrected is measurably wrong"
    assert min(errors["token"]) > 1e-3 and min(errors["geometric"]) > 1e-3
    assert min(errors["rejecting"]) > 1e-3, "what is rejected is missing"


def test_no_weight_corrects_a_kl_term_in_the_reward_for_staleness() -> None:
    """It is that of the policy which sampled; in the loss the weight of the whole completion is enough."""
    reference, beta = logprobs_of(random_tables(9)), 0.5
    now, then = versions(1, 2)
    exact = exact_gradient(now, REWARDS, reference, beta)
    whole = {"off_policy": {"level": "sequence", **OPEN}}
    old = {"size": 2, "sampled_from": logprobs_of(then)}
    in_reward = expected_gradient(config("rloo", beta, **whole), now, reference, REWARDS, **old)
    assert (in_reward - exact).norm() > 0.1 * exact.norm()
    in_loss = config("rloo", beta, kl={"where": "loss", "estimator": "k2"}, **whole)
    fresh = expected_gradient(in_loss, now, reference, REWARDS, size=2)
    torch.testing.assert_close(expected_gradient(in_loss, now, reference, REWARDS, **old), fresh, atol=1e-12, rtol=0)


def test_the_weight_of_a_token_is_exact_for_completions_of_one_token() -> None:
    now, then = versions(1, 4)
    head = [now[0], *(torch.zeros_like(table) for table in now[1:])]
    old = [then[0], *(torch.zeros_like(table) for table in now[1:])]
    rewards = REWARDS.reshape(4, 16).mean(1).repeat_interleave(16)  # the first token decides
    of = config("rloo", 0.0, off_policy={"level": "token", **OPEN})
    found = expected_gradient(of, head, logprobs_of(head), rewards, size=2, sampled_from=logprobs_of(old))
    exact = exact_gradient(head, rewards)
    torch.testing.assert_close(found[:4], exact[:4], atol=1e-12, rtol=0)
    naive = config("rloo", 0.0, off_policy={"weight": "none"})
    wrong = expected_gradient(naive, head, logprobs_of(head), rewards, size=2, sampled_from=logprobs_of(old))
    assert (wrong[:4] - exact[:4]).norm() > 0.1 * exact[:4].norm()


def test_a_bound_trades_the_exactness_for_a_bounded_weight() -> None:
    """The bias of truncation falls with the cap, and is gone at the largest weight there is."""
    now, then = versions(2, 4)
    exact = exact_gradient(now, REWARDS)
    largest = float((logprobs_of(now) - logprobs_of(then)).sum(1).exp().max())
    caps = (1.0, 2.0, largest / 2, largest * 1.01)
    assert largest > 6, "or the caps are not in order"
    bias = [
        float((stale(now, then, level="sequence", weight="truncate", cap=cap) - exact).norm() / exact.norm())
        for cap in caps
    ]
    assert bias == sorted(bias, reverse=True) and bias[-1] < 1e-12 < bias[-2]
    dropped = [
        float((stale(now, then, level="sequence", weight="mask", cap=cap) - exact).norm() / exact.norm())
        for cap in caps
    ]
    assert dropped[0] > bias[0] and dropped[-1] < 1e-12


def test_a_ratio_to_the_behaviour_policy_is_the_weight_of_a_token_until_it_is_clipped() -> None:
    now, then = versions(3, 2)
    wide = {"clip_low": 1.0, "clip_high": 1e9, "kl": {"where": "none"}}
    by_ratio = config("rloo", 0.0, proximal="behaviour", **wide)
    found = expected_gradient(by_ratio, now, logprobs_of(now), REWARDS, size=2, sampled_from=logprobs_of(then))
    torch.testing.assert_close(found, stale(now, then, level="token", **OPEN), atol=1e-12, rtol=0)
    narrow = config("rloo", 0.0, proximal="behaviour", kl={"where": "none"})
    clipped = expected_gradient(narrow, now, logprobs_of(now), REWARDS, size=2, sampled_from=logprobs_of(then))
    assert (clipped - found).norm() > 0.01 * found.norm()
