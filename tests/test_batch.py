"""What a batch's rewards say besides their mean: its standard error, their upper tail, and whether models agree."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainers.batch import assemble, clustered_se, disagreement, informative, rollout_metrics, upper_tail
from trainers.mismatch import from_scores
from trainers.types import Group, Prompt, Rollout, VersionSpan


def rollout(uid: str, reward: float, rewards: Mapping[str, float] | None = None, *, greedy: bool = False) -> Rollout:
    return Rollout(
        uid=uid,
        seed=0,
        token_ids=np.zeros(2, np.int32),
        logprobs=np.zeros(2, np.float32),
        spans=(VersionSpan(start=0, stop=2, version=0),),
        finish_reason="stop",
        text="",
        rewards=rewards or {},
        reward=reward,
        greedy=greedy,
    )


def group(place: int, rollouts: Sequence[Rollout]) -> Group:
    prompt = Prompt(uid=f"e0-p{place}", position=place, messages=(), token_ids=np.zeros(1, np.int32))
    return Group(prompt=prompt, rollouts=tuple(rollouts))


def groups(rewards: Sequence[Sequence[float]]) -> list[Group]:
    return [group(p, [rollout(f"e0-p{p}-s{s}", reward) for s, reward in enumerate(of)]) for p, of in enumerate(rewards)]


def test_the_standard_error_counts_prompts() -> None:
    """By hand: means 2, 6 and 3, their mean 11/3, squares 25/9 + 49/9 + 4/9, over 2 and over 3."""
    by_hand = math.sqrt((25 + 49 + 4) / 9 / 2 / 3)
    assert clustered_se([[1, 3], [5, 7], [3, 3]]) == pytest.approx(by_hand, rel=1e-12)
    rewards = np.random.default_rng(0).normal(size=(16, 8)) + np.random.default_rng(1).normal(size=(16, 1))
    curve = from_scores("r", [0], rewards.reshape(1, -1), clusters=np.repeat(np.arange(16), 8))
    assert curve.se is not None
    assert clustered_se(rewards.tolist()) == pytest.approx(float(curve.se[0]), rel=1e-12)


def test_it_is_how_far_the_mean_of_a_batch_scatters() -> None:
    """Prompts differ by 1, completions of a prompt by 1: over batches of 16 x 8 the mean scatters by sqrt(9/8/16)."""
    rng = np.random.default_rng(2)
    batches = rng.normal(size=(4_000, 16, 1)) + rng.normal(size=(4_000, 16, 8))
    said = math.sqrt(np.mean([(clustered_se(batch) or 0) ** 2 for batch in batches]))
    assert said == pytest.approx(math.sqrt(9 / 8 / 16), rel=0.02)
    assert said == pytest.approx(batches.mean((1, 2)).std(), rel=0.04)
    assert batches[0].std() / math.sqrt(16 * 8) < 0.6 * said, "as if no rollouts shared a prompt"


def test_what_a_step_logs_of_its_rewards() -> None:
    [first, *rest] = groups([[1, 3], [5, 7], [3, 3]])
    greedy = group(0, [*first.rollouts, rollout("e0-p0-g", 100.0, greedy=True)])
    found = rollout_metrics([greedy, *rest], 0)
    assert found["reward/mean"] == pytest.approx(22 / 6) and found["reward/mean_se"] == pytest.approx(math.sqrt(13 / 9))
    assert found["reward/tail"] == pytest.approx((7 - 3) / (1 / 0.6745)), "median 3, deviations 2 0 2 4 0 0: median 1"
    assert "reward/mean_se" not in rollout_metrics(groups([[1, 3, 4]]), 0), "one prompt says nothing of the others"
    alike = rollout_metrics(groups([[1, 1, 0], [1, 0, 1]]), 0)
    assert "reward/tail" not in alike and alike["reward/mean_se"] == 0


def test_the_tail_of_a_normal_batch_is_known() -> None:
    quantiles = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    by_theory = stats.norm.pdf(stats.norm.isf(0.1)) / 0.1
    assert upper_tail((3 + 2 * quantiles).tolist()) == pytest.approx(by_theory, abs=2e-3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=40),
    st.floats(-1e3, 1e3),
    st.floats(1e-2, 1e2),
    st.integers(0, 2**32 - 1),
)
def test_unit_level_and_order_do_not_change_the_tail(
    rewards: list[float], level: float, unit: float, seed: int
) -> None:
    values = np.array(rewards) + np.random.default_rng(seed).normal(size=len(rewards))
    found = upper_tail(values.tolist())
    assert found is not None and found >= 0
    assert upper_tail((level + unit * values[::-1]).tolist()) == pytest.approx(found, rel=1e-5)


def test_a_few_that_score_far_above_the_rest_show_in_the_tail_first() -> None:
    """Of 128 rewards, 3 are raised by 10 of their spreads: neither the mean nor the spread says so as clearly."""
    rng = np.random.default_rng(3)
    healthy = rng.normal(size=(1_000, 128))
    hacked = healthy + 10 * (np.arange(128) < 3)

    def seen(of: Callable[[np.ndarray], Any]) -> float:
        before, after = (np.array([of(batch) for batch in batches]) for batches in (healthy, hacked))
        return float((after - before).mean() / before.std())

    tail = seen(upper_tail)
    assert tail > 5 and tail > 2 * seen(np.mean)

    def by_the_standard_deviation(batch: np.ndarray) -> float:
        return float((np.sort(batch)[-13:].mean() - np.median(batch)) / batch.std())

    assert tail > 3 * seen(by_the_standard_deviation), "those few inflate it, and hide"


FIRST = {"reward/a/mean": 1.0, "reward/a/std": 2.0, "reward/b/mean": -3.0, "reward/b/std": 0.5}


def scored(a: Sequence[float], b: Sequence[float]) -> list[Rollout]:
    return [rollout(str(i), 0.0, {"a": x, "b": y}) for i, (x, y) in enumerate(zip(a, b, strict=True))]


def test_disagreement_by_hand() -> None:
    """In their own units the scores are 0 and 1, 1 and -1, 2 and 2: standard deviations of 1/sqrt 2, sqrt 2 and 0."""
    rollouts = scored([1, 3, 5], [-2.5, -3.5, -2])
    found = disagreement(rollouts, {"a": 1.0, "b": 0.5}, FIRST)
    assert found == pytest.approx((1 / math.sqrt(2) + math.sqrt(2)) / 3, rel=1e-12)
    turned = scored([1, 3, 5], [-3.5, -2.5, -4])  # less of b is better, and its scores are the other way round
    assert disagreement(turned, {"a": 1.0, "b": -0.5}, FIRST) == pytest.approx(found, rel=1e-12)


def test_models_that_say_the_same_in_other_units_agree() -> None:
    a = np.random.default_rng(4).normal(size=30)
    assert disagreement(scored(1 + 2 * a, -3 + 0.5 * a), {"a": 1, "b": 1}, FIRST) == pytest.approx(0, abs=1e-12)


def test_what_pleases_one_model_alone_shows_though_it_is_alike_in_all_samples() -> None:
    a = np.random.default_rng(5).normal(size=30)
    later = disagreement(scored(1 + 2 * (a + 6), -3 + 0.5 * (a + 1)), {"a": 1, "b": 1}, FIRST)
    assert later == pytest.approx(5 / math.sqrt(2), rel=1e-12)


def test_one_model_and_a_model_without_spread_say_nothing() -> None:
    rollouts = scored([1, 2], [3, 4])
    assert disagreement(rollouts, {"a": 1.0}, FIRST) is None and disagreement(rollouts, {}, {}) is None
    assert disagreement(rollouts, {"a": 1.0, "b": 1.0}, FIRST | {"reward/b/std": 0.0}) is None


def test_a_group_informs_where_the_rewards_of_its_sampled_rollouts_differ() -> None:
    same, other, alike = (
        group(0, [rollout(f"s{i}", r) for i, r in enumerate(of)]) for of in ([0, 0, 0], [0, 1, 0], [1, 1])
    )
    assert (informative(same), informative(other), informative(alike)) == (False, True, False)
    greedy = group(0, [rollout("s0", 1.0), rollout("s1", 1.0), rollout("s2", 0.0, greedy=True)])
    assert not informative(greedy), "the greedy completion is not trained on"
    summed = [rollout("s0", 1.0, {"a": 1.0, "b": 0.0}), rollout("s1", 1.0, {"a": 0.0, "b": 1.0})]
    assert not informative(group(0, summed))


def test_a_completion_without_tokens_is_assembled_and_described() -> None:
    empty = replace(rollout("s0", 1.0), token_ids=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32), spans=())
    late = replace(rollout("s1", 0.0), spans=(VersionSpan(start=0, stop=2, version=3),))
    batch = assemble([group(0, [empty, late])], version=4)
    assert batch.mask.tolist() == [[False, False], [True, True]]
    metrics = rollout_metrics([group(0, [empty, late])], version=4)
    assert (metrics["rollout/length_mean"], metrics["rollout/staleness_max"]) == (1.0, 1.0)
    assert metrics["rollout/staleness_mean"] == 1.0, "what was never sampled is of no version"
    assert rollout_metrics([group(0, [empty, empty])], version=4)["rollout/staleness_max"] == 0.0
