"""Gap and length's share where a user meets them: what they come from, and what is said where they cannot be had."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st
from scipy import linalg, stats
from scipy.spatial import distance

from cluster.report.build import build
from cluster.report.page import page
from cluster.report.text import text
from cluster.report.view import interval
from cluster.watch import page as watched
from configs.errors import UserError
from tests.test_report import Parsed
from trainers.measured import Columns, Logged, MeasuredRun, from_headroom
from trainers.mismatch import (
    Answers,
    Curve,
    Ratio,
    Series,
    Settings,
    from_means,
    from_scores,
    judge,
    length_share,
    length_share_of_prompts,
    proxy_gold_gap,
    share_of_length,
)
from trainers.mismatch.series import symmetric_root
from trainers.sources import read
from trainers.types import Evaluation
from trainers.watcher import judge_run

VERSIONS = [0, 10, 20, 30, 40, 50]
PROMPTS = 60
FAST = Settings(runs=2_000)


def scored() -> tuple[np.ndarray, np.ndarray]:
    """Rewards and lengths (6, 60) of the same prompts: half of the rise is bought by 8 more words."""
    rng = np.random.default_rng(0)
    shape, time = (len(VERSIONS), PROMPTS), np.linspace(0, 1, len(VERSIONS))[:, None]
    words = 20 + 8 * time + rng.normal(0, 4, PROMPTS) + rng.normal(0, 3, shape)
    return 0.1 * words + 0.8 * time + rng.normal(0, 1, PROMPTS) + rng.normal(0, 0.1, shape), words


def evaluation(version: int, task: str, uids: Sequence[str], **scores: np.ndarray) -> Evaluation:
    kept = {name: values.astype(np.float32) for name, values in scores.items()}
    return Evaluation(version=version, task=task, prompt_uids=tuple(uids), scores=kept, samples=())


def run(**renamed: str) -> MeasuredRun:
    """A run of Headroom which scored gold, reward and words of its prompts, by these names unless they are renamed."""
    rewards, words = scored()
    uids = [f"p{place}" for place in range(PROMPTS)]
    records = {}
    for place, version in enumerate(VERSIONS):
        named = {"gold": rewards[place] / 3, "reward": rewards[place], "words": words[place]}
        named = {renamed.get(name, name): values for name, values in named.items()}
        other = evaluation(version, "another", uids[:10], reward=words[place][:10], length=rewards[place][:10])
        records[version] = [other, evaluation(version, "task", uids, **named)]
    metrics = {
        "reward/mean": [(version, version / 50) for version in range(51)],
        "rollout/length_mean": [(version, 20 + version / 10) for version in range(51)],
        "time/evaluator-0_busy": [(version, 14.0 * (version in (3, 14))) for version in range(1, 51)],
    }
    params = {"evaluation.primary": "task/gold", "run.name": "mine"}
    return from_headroom("mine", "run", Logged(params=params, tags={}, metrics=metrics, records=records), Columns())


def same(one: Ratio, other: Ratio) -> None:
    assert one.value is not None and other.value is not None
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), rel=1e-10)
    assert one.n == other.n


def test_the_root_is_scipy_s_and_a_singular_covariance_has_one() -> None:
    half = np.random.default_rng(0).normal(size=(5, 5))
    np.testing.assert_allclose(symmetric_root(half @ half.T), linalg.sqrtm(half @ half.T).real, atol=1e-10)
    thin = half[:, :2] @ half[:, :2].T
    root = symmetric_root(thin)
    np.testing.assert_allclose(root @ root, thin, atol=1e-12)
    np.testing.assert_allclose(root, root.T, atol=1e-12)


def test_a_run_s_prompts_say_what_part_of_the_reward_is_length() -> None:
    of = run()
    rewards, words = (values.astype(np.float32).astype(np.float64) for values in scored())
    found = judge_run(of, FAST)
    same(found.length, length_share_of_prompts(VERSIONS, rewards, words))
    assert found.length.value == pytest.approx(0.5, abs=0.1)
    assert found.length.name == "share of task/words in task/reward"
    same(found.gap, proxy_gold_gap(of.series))


def test_time_of_the_evaluator_is_shared_by_all_prompts() -> None:
    assert run().prompt_seconds == pytest.approx((14 + 14) / (2 * (PROMPTS + 10)))  # two have ended


def test_another_task_stands_in_and_without_one_it_is_said_what_is_missing() -> None:
    elsewhere = run(reward="second").answers
    assert elsewhere is not None and (elsewhere.reward, elsewhere.length) == ("another/reward", "another/length")
    series, curve = run().series, from_means("length", [0, 1], [1.0, 2.0], None)
    for length, why in ((None, "no length is known"), (curve, "reward/mean has no standard error")):
        one = share_of_length(series, None, length)
        assert one.value is None and one.not_enough is not None
        assert one.not_enough.startswith(f"not enough: {why}; score reward and length of the same prompts")


def test_prompts_without_a_score_are_left_out() -> None:
    rewards, words = scored()
    rewards[2, 5], words[3, 7], rewards[0, 9] = math.nan, math.nan, math.inf
    answers = Answers(reward="r", length="w", versions=np.array(VERSIONS), rewards=rewards, lengths=words)
    kept = [place for place in range(PROMPTS) if place not in (5, 7, 9)]
    same(
        share_of_length(run().series, answers, None),
        length_share_of_prompts(VERSIONS, rewards[:, kept], words[:, kept]),
    )
    with pytest.raises(UserError, match=r"rewards \(6, 60\) and lengths \(6, 59\) must both be 6 versions by prompts"):
        Answers(reward="r", length="w", versions=np.array(VERSIONS), rewards=rewards, lengths=words[:, 1:])


def curves() -> tuple[Series, Curve]:
    rng = np.random.default_rng(3)
    versions = list(range(0, 120, 10))
    words = 20 + np.linspace(0, 8, 12) + 2 * rng.standard_normal(12)
    words[-1] = words[0] + 8
    reward = from_means("reward", versions, (0.1 * words + np.linspace(0, 0.8, 12)).tolist(), [0.02] * 12)
    return Series(reward=reward, evaluations=(reward,)), from_means("length", versions, words.tolist(), None)


def test_curves_stand_in_for_prompts() -> None:
    series, length = curves()
    same(share_of_length(series, None, length), length_share(series, length))
    assert "length taken as exact: no standard error" in length_share(series, length).estimand


def test_a_table_is_read_for_both(tmp_path: Path) -> None:
    series, length = curves()
    rows = zip(series.reward.versions.tolist(), series.reward.mean.tolist(), length.mean.tolist(), strict=True)
    table = "".join(f"{at},{reward!r},0.02,{words!r},{reward!r},0.02\n" for at, reward, words in rows)
    (tmp_path / "run.csv").write_text("version,reward,reward_se,length,gold,gold_se\n" + table)
    found = judge_run(read(str(tmp_path / "run.csv")), FAST)
    same(found.length, length_share(series, length))
    rewards, words = scored()
    lines = [
        json.dumps({"version": at, "reward": r.tolist(), "length": w.tolist(), "gold": r.tolist()})
        for at, r, w in zip(VERSIONS, rewards, words, strict=True)
    ]
    (tmp_path / "run.jsonl").write_text("\n".join(lines))
    of = read(str(tmp_path / "run.jsonl"), Columns(evaluations=("gold",)))
    same(judge_run(of, FAST).length, length_share_of_prompts(VERSIONS, rewards, words))


def test_page_terminal_and_watch_show_them() -> None:
    of = run()
    view = build(of, FAST)
    shown, said, line = Parsed(page(view, [])).text.replace("\u00a0", " "), text(view), watched(of, view.findings)
    for one in (view.findings.gap, view.findings.length):
        assert one.value is not None and one.estimand in shown
        for words in (one.name, interval(one.value, one.low, one.high)):
            assert words in shown and words in said, words
        assert f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]: " in line
    silent = build(replace(of, answers=None), FAST)
    assert silent.findings.length.not_enough is not None
    for words in (Parsed(page(silent, [])).text, text(silent)):
        assert words.count(silent.findings.length.not_enough) == 1  # in its row, not among the notes again


def test_without_errors_they_are_scipy_s_and_statsmodels() -> None:
    series, length = curves()
    rewards, gold = series.reward.mean, np.sin(np.arange(12.0)) + np.arange(12.0)
    exact = from_means("reward", series.reward.versions.tolist(), rewards.tolist(), None)
    of = Series(reward=exact, evaluations=(from_means("gold", exact.versions.tolist(), gold.tolist(), None),))
    gains = rewards[1:] - rewards[0], gold[1:] - gold[0]
    assert proxy_gold_gap(of).value == pytest.approx(1 - distance.cosine(*gains), abs=1e-10)
    slope = stats.linregress(np.diff(length.mean), np.diff(rewards)).slope
    drift, rise = (curve[-1] - curve[0] for curve in (length.mean, rewards))
    assert length_share(of, length).value == pytest.approx(slope * drift / rise, abs=1e-10)


def test_the_share_of_prompts_is_that_of_statsmodels_with_a_dummy_for_each_prompt_and_version() -> None:
    rewards, words = (values[:, :12] for values in scored())
    prompt, version = np.meshgrid(np.arange(12), np.arange(len(VERSIONS)))
    dummies = [prompt.ravel() == one for one in range(12)] + [version.ravel() == one for one in range(1, len(VERSIONS))]
    fitted = sm.OLS(rewards.ravel(), np.column_stack([words.ravel(), *dummies]).astype(float)).fit()
    rise = (words[-1] - words[0]).mean() / (rewards[-1] - rewards[0]).mean()
    found = length_share_of_prompts(VERSIONS, rewards, words, draws=20)
    assert found.value == pytest.approx(fitted.params[0] * rise, abs=1e-10)


@checked(max_examples=10, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e2, 1e2), unit=st.floats(1e-2, 1e2))
def test_units_change_nothing(scale: float, shift: float, unit: float) -> None:
    rewards, words = scored()
    base = length_share_of_prompts(VERSIONS, rewards, words, draws=50)
    moved = length_share_of_prompts(VERSIONS, scale * (rewards + shift), unit * words + shift, draws=50)
    assert (moved.value, moved.low, moved.high) == pytest.approx((base.value, base.low, base.high), abs=1e-6)
    pairs = []
    for factor, other, off in ((1.0, 1.0, 0.0), (scale, unit, shift)):
        reward = from_scores("reward", VERSIONS, factor * (rewards + off))
        pairs.append(Series(reward=reward, evaluations=(from_scores("gold", VERSIONS, other * (words + off)),)))
    base, moved = (proxy_gold_gap(series, draws=50) for series in pairs)
    assert (moved.value, moved.low, moved.high) == pytest.approx((base.value, base.low, base.high), abs=1e-6)


@checked(max_examples=10, deadline=None)
@given(st.permutations(range(PROMPTS)), st.permutations(range(3)))
def test_the_order_of_prompts_and_of_further_evaluations_changes_nothing(prompts: list[int], others: list[int]) -> None:
    rewards, words = scored()
    named = [("a", words), ("b", -rewards), ("c", rewards - 0.1 * words)]
    told = []
    for columns, order in ((range(PROMPTS), range(3)), (prompts, others)):
        further = [from_scores(named[place][0], VERSIONS, named[place][1][:, list(columns)]) for place in order]
        gold = from_scores("gold", VERSIONS, -words[:, list(columns)])
        reward = from_scores("reward", VERSIONS, rewards[:, list(columns)])
        told.append((
            judge(Series(reward=reward, evaluations=(gold, *further)), FAST),
            length_share_of_prompts(VERSIONS, rewards[:, list(columns)], words[:, list(columns)], draws=2).value,
        ))  # fmt: skip
    (one, share), (other, again) = told
    assert (one.state, one.since_version, one.history) == (other.state, other.since_version, other.history)
    assert share == pytest.approx(again, abs=1e-10)
    found = {alarm.evaluation: alarm for alarm in other.others}
    for alarm in (one.primary, *one.others):
        same_one = other.primary if alarm.evaluation == "gold" else found[alarm.evaluation]
        assert (alarm.raised, alarm.falls, alarm.alpha) == (same_one.raised, same_one.falls, same_one.alpha)
        assert alarm.minimum_detectable_drop == pytest.approx(same_one.minimum_detectable_drop, rel=1e-3)


def test_the_bootstrap_is_that_of_prompts_drawn_one_by_one() -> None:
    rewards, words = scored()
    shares = []
    for row in np.random.default_rng(5).integers(0, PROMPTS, (40, PROMPTS)):
        y, x = (z[:, row] - z[:, row].mean(0) - z[:, row].mean(1, keepdims=True) for z in (rewards, words))
        y, x = y - y.mean(), x - x.mean()
        rises = [float((z[-1] - z[0])[row].mean()) for z in (words, rewards)]
        shares.append((x * y).sum() / (x * x).sum() * rises[0] / rises[1])
    found = length_share_of_prompts(VERSIONS, rewards, words, draws=40, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])), abs=1e-10)
