"""The learner's benchmark compares equal work, and says so when it does not."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.learner import CUT, GOALS, HEADROOM, PLAIN, SHARED, Headroom, PlainLoop, check, make_case, measure
from tests.tiny import policy


def test_every_arm_is_measured_on_every_batch(tmp_path: Path) -> None:
    results = measure(policy(tmp_path / "tiny"), prompts=2, rows=4, rounds=2, zero=0)
    rates = {name: found for name, found in results.items() if name.endswith("tokens/s")}
    arms = (PLAIN, CUT, HEADROOM, SHARED)
    assert set(rates) == {f"{case}: {arm}, tokens/s" for case in ("fixed", "heavy-tailed") for arm in arms}
    assert all(found["steps"] == 2 and found["low"] > 0 for found in rates.values())
    ratios = {name: found["goal"] for name, found in results.items() if "goal" in str(found)}
    assert sorted(ratios.values()) == sorted([*GOALS.values()] * 2)
    tail = [results[f"heavy-tailed: tokens forwarded, {arm}"] for arm in ("prompts shared", "headroom", "plain loop")]
    assert tail == sorted(tail) and tail[1] < 0.6 * tail[2]


def test_unequal_work_is_refused(tmp_path: Path) -> None:
    path = policy(tmp_path / "tiny")
    plain, headroom = PlainLoop(path), Headroom(path, 0)
    case = make_case("heavy-tailed", prompts=2, rows=4, vocabulary=128)
    with pytest.raises(RuntimeError, match="log-probs differ"):
        headroom.step(case, share=True)  # whose behaviour log-probs are still zeros
    case = replace(case, batch=replace(case.batch, behaviour_logprobs=plain.behaviour(case)))
    expected = plain.step(case)
    check("same", headroom.step(case, share=True), expected)
    other = replace(case, batch=replace(case.batch, rewards=case.batch.rewards[::-1].copy()))
    with pytest.raises(RuntimeError, match="not equal work"):
        check("other rewards", plain.step(other), expected)
