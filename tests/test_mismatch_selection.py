"""Selection: its parts against scipy and statsmodels, its errors in a small simulation of fixed seed, its refusals."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from benchmarks.selection import KEPT, NO_GAIN, RIVALS, SAMPLES, cells, measure, row, summary, table, truths
from configs.errors import UserError
from trainers.mismatch import Curve, Series, choose, from_means, from_scores, report, rivals, shortlist
from trainers.mismatch.selection import pool
from trainers.mismatch.smoothing import AMPLITUDES, JUMPS, LENGTHS, smooth, steadied

POINTS = 10
VERSIONS = list(range(0, 10 * POINTS, 10))
PEAK = np.array([0.0, 3, 6, 8, 9, 10, 9, 7, 4, 0])


def curve(mean: np.ndarray, se: float | None = 1.0, versions: list[int] = VERSIONS) -> Curve:
    return from_means("gold", versions, mean.tolist(), None if se is None else [se] * len(mean))


def measured(seed: int = 0) -> Curve:
    return curve(PEAK + np.random.default_rng(seed).standard_normal(POINTS))


@pytest.mark.parametrize("rough", [True, False])
def test_smoothing_is_the_average_of_gaussian_processes_by_the_density_of_differences(rough: bool) -> None:
    noisy = measured()
    time, errors = np.arange(POINTS), (1 + 1e-6) * np.eye(POINTS)
    apart = np.abs(time[:, None] - time)
    differences = np.diff(np.eye(POINTS), axis=0)
    seen, back = differences @ noisy.mean, errors @ differences.T
    means, covariances, densities = [], [], []
    for amplitude, length in itertools.product(AMPLITUDES, LENGTHS):
        r = np.sqrt(5) * apart / length
        kinked, curved = np.exp(-apart / length), (1 + r + r**2 / 3) * np.exp(-r)
        jumps = [(np.outer(time >= at, time >= at), size) for at in range(1, POINTS) for size in JUMPS]
        paths = [(1 / 28 / len(jumps), amplitude**2 * curved + size**2 * step) for step, size in jumps]
        paths += [(1 / 28 if rough else 1 / 56, amplitude**2 * kinked), (0 if rough else 1 / 56, amplitude**2 * curved)]
        for prior, path in paths:
            spread = differences @ (path + errors) @ differences.T
            densities.append(prior * stats.multivariate_normal.pdf(seen, cov=spread))
            means.append(noisy.mean - back @ np.linalg.solve(spread, seen))
            covariances.append(errors - back @ np.linalg.solve(spread, back.T))
    mean, covariance = smooth(noisy, rough=rough)
    weights = np.array(densities) / np.sum(densities)
    expected = weights @ np.array(means)
    within = np.tensordot(weights, np.array(covariances), 1)
    between = sum(w * np.outer(m - expected, m - expected) for w, m in zip(weights, means, strict=True))
    np.testing.assert_allclose(mean, expected, atol=1e-8)
    np.testing.assert_allclose(covariance, within + between, atol=1e-8)


def test_correlations_of_few_prompts_are_drawn_towards_their_mean() -> None:
    correlation = np.array([[1, 0.9, 0.3], [0.9, 1, 0.6], [0.3, 0.6, 1]])
    sd = np.array([1.0, 2.0, 3.0])
    drawn = steadied(np.outer(sd, sd) * correlation, prompts=6) / np.outer(sd, sd)
    np.testing.assert_allclose(drawn, 0.75 * correlation + 0.25 * (0.6 + 0.4 * np.eye(3)), atol=1e-12)
    np.testing.assert_array_equal(steadied(correlation, None), correlation)
    equal = 0.6 + 0.4 * np.eye(3)
    np.testing.assert_allclose(steadied(equal, 5), equal, atol=1e-12)
    scores = np.random.default_rng(7).normal(size=(50, 60))  # an inverse of this is mostly noise
    assert np.linalg.cond(steadied(np.cov(scores), 60)) < np.linalg.cond(np.cov(scores)) / 100


def test_pooling_equals_generalised_least_squares_of_statsmodels() -> None:
    rng = np.random.default_rng(1)
    first = from_scores("gold", VERSIONS, rng.normal(size=(POINTS, 60)) + rng.normal(size=60))
    again = from_scores("gold", [0, 40, 50], rng.normal(size=(3, 40)) + rng.normal(size=40))
    held = np.isin(VERSIONS, again.versions)
    fit = sm.GLS(
        np.concatenate([first.mean, again.mean]),
        np.concatenate([np.eye(POINTS), np.eye(POINTS)[held]]),
        sigma=linalg.block_diag(first.covariance, again.covariance),
    ).fit()
    pooled = pool(first, again)
    np.testing.assert_allclose(pooled.mean, fit.params, atol=1e-10)
    np.testing.assert_allclose(pooled.covariance, fit.normalized_cov_params, atol=1e-10)
    assert pooled.prompts == 40


def test_versions_that_answer_alike_are_pooled_too() -> None:
    scores = np.random.default_rng(6).normal(size=(4, 30))
    scores[1] = scores[0]
    first, again = from_scores("gold", range(4), scores[:, :20]), from_scores("gold", [0, 1, 3], scores[[0, 1, 3], 20:])
    pooled = pool(first, again)
    assert pooled.mean[0] == pytest.approx(pooled.mean[1], abs=1e-10)
    gain = report(choose(first, again)).gain
    assert gain is not None and np.isfinite([gain.low, gain.high]).all()


def test_the_untouched_sample_gives_the_intervals_of_scipy() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(2, 50)) + rng.normal(size=50) + np.array([[0.0], [1.0]])
    choice = choose(curve(PEAK), curve(PEAK[[0, 5, 6]], versions=[0, 50, 60]))
    assert (choice.version, choice.base, choice.reevaluated) == (50, 0, True)
    found = report(choice, from_scores("gold", [0, 50], scores), level=0.9)
    value = stats.ttest_1samp(scores[1], 0).confidence_interval(0.9)
    gain = stats.ttest_rel(scores[1], scores[0]).confidence_interval(0.9)
    for said, mean, expected in (
        (found.value, scores[1].mean(), value),
        (found.gain, (scores[1] - scores[0]).mean(), gain),
    ):
        assert said is not None
        assert (said.value, said.low, said.high) == pytest.approx((mean, expected.low, expected.high), abs=1e-10)
    assert found.source == "untouched" and found.note is None
    assert "true mean of gold at version 50" in found.estimand and "version 0" in found.estimand


def test_the_shortlist_holds_the_base_and_the_likely_best() -> None:
    listed = shortlist(measured())
    assert listed.base == 0 and len(listed.versions) == 4 and {0, 50} <= set(listed.versions)
    assert set(listed.versions) < {0, 30, 40, 50, 60}
    assert shortlist(measured(), size=50).versions == tuple(VERSIONS)
    assert shortlist(measured(), among=[0, 10, 70, 90]).versions == (0, 10, 70, 90)
    assert shortlist(curve(PEAK, 1e-3)).versions == (0, 40, 50, 60), "the best is sure: then the next best"
    with pytest.raises(UserError, match="a shortlist of 0 versions"):
        shortlist(measured(), size=0)


def test_the_shortlist_does_not_spend_itself_on_versions_that_are_surely_alike() -> None:
    prompts = np.random.default_rng(3).normal(size=400)
    own = np.random.default_rng(4).normal(size=(5, 400))
    scores = prompts + np.array([0.1, 1, 1, 1, 0.1])[:, None] * own
    scores[1:3] = scores[3]  # the same answers at three versions
    scores[4] += 3 * np.random.default_rng(5).normal(size=400)
    scores -= scores.mean(1, keepdims=True) - np.array([[0.0], [1.0], [1.0], [1.0], [0.9]])
    assert 4 in shortlist(from_scores("gold", range(5), scores), size=2).versions


def test_the_pooled_data_choose_and_only_among_what_was_evaluated_again() -> None:
    first = curve(np.array([0.0, 1, 2, 9, 8, 0]), versions=[0, 1, 2, 3, 4, 5])
    assert choose(first).version == 3 and not choose(first).reevaluated
    again = curve(np.array([0.0, 1, 12]), versions=[0, 3, 4])
    assert choose(first, again).version == 4 and choose(first, again).candidates == (0, 3, 4)
    worse = curve(np.array([20.0, 0, 0]), versions=[0, 3, 4])
    assert choose(first, worse).version == 0
    zero = report(choose(first, worse)).gain
    assert zero is not None and (zero.value, zero.low, zero.high) == (0, 0, 0)


def test_without_an_untouched_sample_the_value_is_shrunk_and_says_so() -> None:
    alone, twice = choose(measured()), choose(measured(), curve(PEAK[[0, 4, 5]], versions=[0, 40, 50]))
    for choice, source, words in ((alone, "curve", "the curve alone"), (twice, "pooled", "and its re-evaluation")):
        found = report(choice)
        assert found.source == source and found.note is not None
        assert words in found.note and "biased upward" in found.note
        assert found.value is not None and choice.version is not None
        assert found.value.value < choice.pooled.mean[VERSIONS.index(choice.version)]
        assert found.value.low < 10 < found.value.high
        assert found.gain is not None
        assert found.gain.value == pytest.approx(found.value.value - choice.pooled.mean[0], abs=1e-12)


def test_rivals_choose_by_their_rules() -> None:
    evaluation = curve(PEAK)
    series = Series(
        reward=from_means("reward", [0, 10, 15, 30, 40], [9.0, 1, 50, 12, 11], None),
        evaluations=(evaluation,),
        kl=from_means("kl", VERSIONS[1:], np.arange(1.0, POINTS).tolist(), None),
    )
    last, reward, kl, raw = rivals(series, kl_budget=3.5)
    assert [one.rule for one in (last, reward, kl, raw)] == ["last", "highest reward", "KL budget", "raw best"]
    assert [one.version for one in (last, reward, kl, raw)] == [90, 30, 30, 50]
    assert reward.note == "reward was not measured at version 20, 50, 60, 70, 80, 90"
    assert kl.note == "kl was not measured at version 0"
    assert last.gain is not None and last.value is not None and last.source == "curve"
    half = stats.norm.isf(0.025)
    assert (last.value.value, last.value.low, last.value.high) == pytest.approx((0, -half, half), abs=1e-10)
    assert (last.gain.low, last.gain.high) == pytest.approx((-half * np.sqrt(2), half * np.sqrt(2)), abs=1e-10)
    assert raw.value is not None and raw.value.value < 10
    fresh = curve(np.array([1.0, 2, 3]), 0.1, [0, 50, 90])
    assert [one.source for one in rivals(series, fresh=fresh)] == ["untouched", "curve", "curve", "untouched"]
    again = rivals(series, fresh=fresh)[0].gain
    assert again is not None and again.value == pytest.approx(2)


def test_not_enough_is_said_with_its_reason() -> None:
    short, unknown = curve(PEAK[:2], versions=[0, 1]), curve(PEAK, None)
    constant = from_scores("gold", [0, 1, 2], np.ones((3, 5)))
    cases = ((short, "2 evaluated versions"), (unknown, "no standard error"), (constant, "score the same"))
    for one, reason in cases:
        listed, choice = shortlist(one), choose(one)
        found = report(choice)
        for said in (listed.not_enough, choice.not_enough, found.not_enough):
            assert said is not None and reason in said
        assert listed.versions == () and listed.base is choice.version is found.value is found.gain is None
        reward = from_means("reward", [1000], [0.0], None)
        told = rivals(Series(reward=reward, evaluations=(one,)))
        assert all(rival.value is None and rival.gain is None and rival.not_enough for rival in told)
        assert told[1].version is None and told[2].version is None
    nameless = curve(PEAK[[0, 5]], None, [0, 50])
    again, fresh = choose(measured(), nameless), report(choose(curve(PEAK)), nameless)
    assert again.version is None and again.not_enough is not None and "no standard error" in again.not_enough
    assert fresh.value is None and fresh.not_enough is not None and "no standard error" in fresh.not_enough
    high = Series(reward=curve(PEAK), evaluations=(curve(PEAK),), kl=curve(PEAK + 5))
    silent = Series(reward=from_means("reward", [5], [1.0], None), evaluations=(curve(PEAK),))
    assert [rivals(high, kl_budget=1.0)[2].not_enough, rivals(high)[2].not_enough] == [
        "not enough: gold is above 1 at every evaluated version that has it",
        "not enough: no KL budget was declared",
    ]
    assert [one.not_enough for one in rivals(silent)[1:3]] == [
        "not enough: reward was not measured at any evaluated version",
        "not enough: the series has no KL",
    ]


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="the re-evaluation lacks version 0"):
        choose(measured(), curve(PEAK[[4, 5]], versions=[40, 50]))
    with pytest.raises(UserError, match="the re-evaluation has version 45, which gold has not"):
        choose(measured(), curve(PEAK[[0, 4, 5]], versions=[0, 40, 45]))
    with pytest.raises(UserError, match="the untouched sample lacks version 0"):
        report(choose(curve(PEAK)), curve(PEAK[[5]], versions=[50]))
    with pytest.raises(UserError, match="there is no evaluation golb: the series has gold"):
        rivals(Series(reward=curve(PEAK), evaluations=(curve(PEAK),)), evaluation="golb")


def test_a_small_simulation_keeps_the_gain_and_tells_its_value() -> None:
    runs = 25
    found = {cell.name: measure(cell, runs) for cell in cells(["independent"], [POINTS], [0.1])}
    kept = {rule: np.mean([found[name].kept[rule] for name in found if name not in NO_GAIN]) for rule in KEPT}
    assert kept["selected"] >= 0.95 and kept["selected"] > max(kept[rule] for rule in RIVALS)
    for told in ([cell.value for cell in found.values()], [cell.gain for cell in found.values()]):
        for source in SAMPLES:
            off, _, miss = np.concatenate([one[source] for one in told]).T
            assert miss.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(miss))
            assert source == "curve" or abs(off.mean()) <= 3 * off.std() / np.sqrt(len(off))
    cell = next(iter(cells(["paired"], [POINTS], [0.1])))
    line = row(cell, measure(cell, 3))
    assert (line["truth"], line["errors"], line["K"], line["runs"]) == ("kink early", "paired", POINTS, 3)
    assert summary([line]).splitlines()[2].startswith("| paired | 10 | 0.1 | 3 | ")
    assert table([line]).count("| kink early | paired | 10 | 0.1 |") == 2


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-1e2, 1e2),
    spacing=st.integers(1, 1000),
    start=st.integers(0, 1000),
)
def test_nothing_depends_on_units(seed: int, scale: float, shift: float, spacing: int, start: int) -> None:
    base = measured(seed)
    versions = [start + spacing * place for place in range(POINTS)]
    moved = curve(scale * base.mean + shift, scale, versions)
    as_before = [10 * versions.index(version) for version in shortlist(moved).versions]
    assert tuple(as_before) == shortlist(base).versions
    one, other = report(choose(base)), report(choose(moved))
    assert one.version is not None and other.version == versions[VERSIONS.index(one.version)]
    assert one.value is not None and one.gain is not None and other.value is not None and other.gain is not None
    for end in ("value", "low", "high"):
        size = scale * 10
        assert getattr(other.value, end) == pytest.approx(scale * getattr(one.value, end) + shift, abs=1e-6 * size)
        assert getattr(other.gain, end) == pytest.approx(scale * getattr(one.gain, end), abs=1e-6 * size)


def test_a_renamed_evaluation_changes_nothing() -> None:
    other = replace(measured(), name="helpful", notes=("a note",))
    assert choose(other).version == choose(measured()).version and choose(other).evaluation == "helpful"


@pytest.mark.parametrize("points", [10, 20])
def test_simulated_truths_start_at_the_base_and_gain_one(points: int) -> None:
    found = truths(points)
    assert all(path[0] == 0 and np.isfinite(path).all() for path in found.values())
    assert [path.max() for path in found.values()] == [1.0] * (len(found) - 2) + [0.0, 0.0]
