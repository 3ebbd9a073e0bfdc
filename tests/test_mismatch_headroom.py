"""Headroom: laws that give back their peak, forecasts that contain breaks, gaps and shares that were planted."""

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from benchmarks.forecast import HORIZON, PEAK, families, local_level, measure, persistence
from configs.errors import UserError
from trainers.mismatch import (
    Curve,
    Series,
    crps,
    crps_normal,
    fit_law,
    forecast,
    from_means,
    from_scores,
    headroom_within,
    length_share,
    length_share_of_prompts,
    paths,
    proxy_gold_gap,
)
from trainers.mismatch.headroom import gains, onward, outlook
from trainers.mismatch.models import REVERSIONS, SLOPES, models

POINTS = 12
VERSIONS = list(range(0, 10 * POINTS, 10))
D = 0.2 * np.arange(POINTS)
BON = D * (2 - 0.4 * D)  # peaks at 2.5, gains 2.5
RL = D * (1 - 0.8 * np.log(np.maximum(D, 1e-300)))  # peaks at exp(0.25), gains 0.8 exp(0.25)


def series(gold: np.ndarray, se: float | None = 0.05, *, kl: bool = True, reward: np.ndarray = D) -> Series:
    return Series(
        reward=from_means("reward", VERSIONS[: len(gold)], reward[: len(gold)].tolist(), None),
        kl=from_means("kl", VERSIONS[: len(gold)], (D[: len(gold)] ** 2).tolist(), None) if kl else None,
        evaluations=(
            from_means("gold", VERSIONS[: len(gold)], gold.tolist(), None if se is None else [se] * len(gold)),
        ),
    )


@pytest.mark.parametrize(
    ("name", "gold", "law"),
    [("best-of-n", BON, (2, 0.4, 2.5, 2.5)), ("rl", RL, (1, 0.8, np.exp(0.25), 0.8 * np.exp(0.25)))],
)
def test_a_law_gives_back_its_peak(name: str, gold: np.ndarray, law: tuple[float, ...]) -> None:
    by_name = {one.name: one for one in headroom_within(series(gold + 3), kl=9.0, draws=50).laws}
    found = by_name[name]
    assert (found.alpha, found.beta, found.peak, found.gain) == pytest.approx(law, rel=1e-8)
    assert found.base == pytest.approx(3, abs=1e-8)
    assert found.bic == min(one.bic for one in by_name.values())
    sharp = headroom_within(series(gold, 1e-4), kl=9.0, draws=50)
    assert dict(sharp.weights)[name] > 0.99 * (1 - paths.LEVEL_FLOOR)
    assert sum(weight for _, weight in sharp.weights) == pytest.approx(1)


def test_a_law_is_generalised_least_squares_in_any_order() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(POINTS, POINTS))
    covariance, gold = root @ root.T / 100 + 0.01 * np.eye(POINTS), BON + rng.normal(0, 0.1, POINTS)
    oracle = sm.GLS(gold, np.stack([np.ones(POINTS), D, -(D**2)], 1), covariance).fit()
    spread = oracle.cov_params() / oracle.scale  # the covariance is known, not only up to a factor
    order = rng.permutation(POINTS)
    for rows in (np.arange(POINTS), order):
        found = fit_law("best-of-n", D[rows], gold[rows], covariance[np.ix_(rows, rows)])
        np.testing.assert_allclose([found.base, found.alpha, found.beta], oracle.params, rtol=1e-8)
        np.testing.assert_allclose(found.covariance, spread, rtol=1e-8)


def test_an_rl_law_does_not_depend_on_the_unit_of_distance() -> None:
    one, other = (fit_law("rl", scale * D, RL, 0.01 * np.eye(POINTS)) for scale in (1.0, 7.0))
    assert one.peak is not None and other.peak == pytest.approx(7 * one.peak)
    assert other.gain == pytest.approx(one.gain)
    with pytest.raises(UserError, match="three different distances"):
        fit_law("rl", np.ones(4), np.ones(4), np.eye(4))


def test_crps_of_draws_is_the_closed_form_and_that_is_the_integral() -> None:
    quantiles = 2 + 3 * stats.norm.ppf((np.arange(4_000) + 0.5) / 4_000)
    for truth in (-4.0, 2.0, 3.5):
        closed = crps_normal(2, 3, truth)
        integral = integrate.quad(lambda x, y=truth: (stats.norm.cdf(x, 2, 3) - (x >= y)) ** 2, -30, 30, points=[truth])
        assert closed == pytest.approx(integral[0], rel=1e-6)
        assert crps(quantiles, truth) == pytest.approx(closed, rel=2e-3)
    assert crps_normal(1, 0, 3) == crps(np.array([1.0]), 3) == 2


@pytest.mark.parametrize("kl", [True, False])
def test_without_noise_the_forecast_is_the_law_or_a_break(kl: bool) -> None:
    for one in forecast(series(BON[:9], 1e-4, kl=kl), draws=400):
        d = 0.2 * (8 + one.ahead)
        assert one.version == 80 + 10 * one.ahead
        goes_on = (1 - paths.LEVEL_FLOOR) * (1 - paths.STOPS) * np.exp(-paths.BREAKS * one.ahead / 9)
        assert np.mean(np.abs(one.draws - d * (2 - 0.4 * d)) < 0.02) > 0.9 * goes_on


def test_intervals_contain_a_cliff_and_a_second_rise_that_nothing_announces() -> None:
    gold = np.minimum(np.arange(10), 5) / 5
    for one in forecast(series(gold, 0.03), draws=600):
        assert one.low is not None and one.high is not None and one.smooth_low is not None
        assert one.low < 1 - 0.75 < one.smooth_low
        assert one.high > 1 + 0.2 * one.ahead
        assert one.low <= np.quantile(one.draws, 0.1) <= 1 <= one.high


def test_headroom_is_one_sided_where_the_curve_cannot_tell() -> None:
    before = headroom_within(series(BON[:8]), kl=6.25, draws=400)
    assert before.answer == "not identified" and before.low is before.high is None
    assert before.reason is not None and "cannot be excluded" in before.reason
    assert before.smooth_low is not None and before.smooth_high is not None
    assert before.smooth_low <= 2.5 - BON[7] <= before.smooth_high
    over = headroom_within(series(D * (1 - 0.3 * D)), kl=float((D[-1] + 0.2) ** 2), draws=400)
    assert over.answer == "at most" and over.low is None and over.high is not None and over.high > 0
    dared = headroom_within(series(D, 1e-3), kl=float((D[-1] + 0.2) ** 2), level=0.02, draws=400)
    assert dared.answer == "interval" and dared.low is not None and dared.high is not None
    assert 0 < dared.low <= dared.high <= 0.3


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_answers_move_with_the_unit_of_the_evaluation(seed: int, scale: float, shift: float) -> None:
    gold = RL + np.random.default_rng(seed).normal(0, 0.1, POINTS)
    base, moved = (
        (headroom_within(one, version=150, draws=200), forecast(one, (2,), draws=200)[0])
        for one in (series(gold, 0.1), series(scale * (gold + shift), 0.1 * scale))
    )
    assert moved[0].answer == base[0].answer
    assert moved[0].smooth_high == pytest.approx(scale * (base[0].smooth_high or 0), rel=1e-5, abs=1e-6 * scale)
    for name in ("median", "low", "high", "smooth_low", "smooth_high"):
        expected = scale * (getattr(base[1], name) + shift)
        assert getattr(moved[1], name) == pytest.approx(expected, rel=1e-5, abs=1e-5 * scale)


@pytest.mark.parametrize(
    ("gold", "se", "reason"),
    [
        (np.full(POINTS, 0.3), 0.1, "gold is constant"),
        (BON[:5], 0.1, "5 evaluated versions, 6 are needed"),
        (BON, None, "give gold_se"),
    ],
)
def test_not_enough_is_said_with_its_reason(gold: np.ndarray, se: float | None, reason: str) -> None:
    found = headroom_within(series(gold, se), version=500)
    assert found.answer == "not identified" and found.reason is not None and reason in found.reason
    for one in forecast(series(gold, se)):
        assert one.not_identified is not None and reason in one.not_identified
        assert one.median is one.low is one.high is None and len(one.draws) == 0


def test_few_prompts_and_a_kl_that_stands_still_are_survived() -> None:
    scores = BON[:, None] + np.random.default_rng(5).normal(0, 0.2, (POINTS, 8))
    few = from_scores("gold", VERSIONS, scores)  # its covariance has no inverse
    assert np.linalg.matrix_rank(few.covariance) < POINTS
    fewer = from_scores("gold", VERSIONS, scores[:, :5])
    one = Series(reward=from_means("reward", VERSIONS, D.tolist(), None), evaluations=(fewer,))
    assert "5 prompts" in str(headroom_within(one, version=120).reason)
    for kl in (None, from_means("kl", VERSIONS, [0.5] * POINTS, None)):
        one = Series(reward=from_means("reward", VERSIONS, D.tolist(), None), evaluations=(few,), kl=kl)
        found = headroom_within(one, version=120, draws=200)
        assert found.axis.startswith("versions") and found.smooth_high is not None and np.isfinite(found.smooth_high)
        assert bool(found.notes) == (kl is not None)


def test_budgets() -> None:
    for budgets in ({}, {"kl": 1.0, "version": 3}):
        with pytest.raises(UserError, match="one budget"):
            headroom_within(series(BON), **budgets)
    with pytest.raises(UserError, match="needs the KL"):
        headroom_within(series(BON, kl=False), kl=9.0)
    with pytest.raises(UserError, match="1 or more"):
        forecast(series(BON), (0,))
    for spent in (headroom_within(series(BON), kl=4.0), headroom_within(series(BON), version=110)):
        assert spent.answer == "not identified" and spent.reason is not None and "spent" in spent.reason


def test_the_gap_is_the_slope_of_the_gains() -> None:
    rise = np.linspace(0, 2, POINTS)
    for gold, slope in ((5 + 3 * rise, 1.0), (5 - rise, -1.0)):
        found = proxy_gold_gap(series(gold, None, reward=rise))
        assert (found.value, found.low, found.high) == pytest.approx((slope,) * 3)
    part = np.where(rise < 1, rise, 2 - rise)
    gains = rise[1:], part[1:]
    expected = gains[0] @ gains[1] / np.sqrt((gains[0] @ gains[0]) * (gains[1] @ gains[1]))
    assert proxy_gold_gap(series(part, None, reward=rise)).value == pytest.approx(expected)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        one = proxy_gold_gap(series(part + rng.normal(0, 0.1, POINTS), 0.1, reward=rise), draws=200)
        assert one.low is not None and one.high is not None
        covered += one.low <= expected <= one.high
    assert covered >= 0.93 * 200 - 2 * np.sqrt(200 * 0.05 * 0.95)


def test_the_gap_says_not_enough() -> None:
    assert "constant" in str(proxy_gold_gap(series(np.ones(POINTS), 0.1)).not_enough)
    assert "is error" in str(proxy_gold_gap(series(0.1 * D, 2.0)).not_enough)
    assert "4 versions" in str(proxy_gold_gap(series(BON[:4])).not_enough)


def length(values: np.ndarray) -> Curve:
    return from_means("length", VERSIONS, values.tolist(), [0.1] * POINTS)


def test_length_is_given_its_share_of_the_reward_and_drift_is_not() -> None:
    rng = np.random.default_rng(1)
    words = 20 + 0.5 * np.arange(POINTS) + rng.normal(0, 2, POINTS)
    words[-1] = words[0] + 8
    rest = np.linspace(0, 1, POINTS)
    all_length = length_share(series(BON, reward=0.1 * words), length(words))
    assert all_length.value == pytest.approx(1, abs=0.02)
    half = length_share(series(BON, reward=0.1 * words + 0.8 * rest), length(words))
    assert half.value == pytest.approx(0.5, abs=0.02) and half.low is not None and half.high is not None
    assert half.low <= half.value <= half.high
    none = length_share(series(BON, reward=rest), length(words))
    assert none.value == pytest.approx(0, abs=0.02)
    steady = length_share(series(BON, reward=rest), length(20 + rest))
    assert steady.value is None and "too evenly" in str(steady.not_enough)


def test_length_share_of_prompts() -> None:
    rng = np.random.default_rng(2)
    shape = (4, 300)
    words = 30 + 4 * np.arange(4)[:, None] + 10 * rng.normal(size=(1, 300)) + 5 * rng.normal(size=shape)
    rise = words[-1].mean() - words[0].mean()
    ability = rng.normal(size=(1, 300)) - 0.3 * words.mean(0)  # prompts with long answers are hard
    for bought in (0.0, 0.5, 1.0):
        trend = (1 - bought) * 0.1 * rise * np.arange(4)[:, None] / 3
        rewards = bought * 0.1 * words + trend + ability + 0.05 * rng.normal(size=shape)
        found = length_share_of_prompts([0, 1, 2, 3], rewards, words, draws=100)
        assert found.value == pytest.approx(bought, abs=0.03)
        assert found.low is not None and found.high is not None and found.high - found.low < 0.15
    assert length_share_of_prompts([0, 1, 2, 3], -rewards, words, draws=20).value is None
    with pytest.raises(UserError, match="by prompts"):
        length_share_of_prompts([0, 1], rewards, words)


def standardised(gold: np.ndarray, se: float) -> paths.Seen:
    """One run (n,) or several (R, n)."""
    values = np.atleast_2d(gold)
    n = values.shape[1]
    return paths.standardise(values, se**2 * np.eye(n), np.arange(n), D[:n])


def test_models_are_covariances_of_what_their_names_say() -> None:
    time = np.append(np.arange(8) / 7, [8 / 7, 10 / 7])
    found = models(time, time[None], 8)
    assert found.prior.sum() == pytest.approx(1)
    assert np.linalg.eigvalsh(found.covariance).min() > -1e-8
    at = {name: place for place, name in enumerate(found.names)}
    assert np.ptp(found.covariance[at["plateau"]][6:-1], axis=0).max() < 1e-12  # its line ends at the last but one
    slopes = np.diff(found.covariance[at["linear"]][:-1], axis=0) / np.diff(time)[:, None]
    np.testing.assert_allclose(np.ptp(slopes, axis=0), 0, atol=1e-9)
    trend = found.covariance[found.names.index("trend")][:-1, :-1] - 1  # less the base's
    for i, j in ((3, 3), (2, 9), (7, 5)):
        integral = integrate.dblquad(
            lambda u, w: SLOPES[0] ** 2 * np.exp(-REVERSIONS[0] * abs(u - w)), 0, time[i], 0, time[j]
        )
        assert trend[i, j] == pytest.approx(integral[0], rel=1e-5)


def test_weights_are_products_of_one_step_densities() -> None:
    """Each value from those before it, by the conditional normal written out."""
    seen = standardised(BON[:7] + 0.1 * np.sin(5 * D[:7]), 0.1)
    time, n = seen.steps / seen.steps[-1], 7
    among = models(time, seen.x[None], n)
    octave = np.round(np.log2(seen.swing[0]))
    scores = []
    for covariance, bounded in zip(among.covariance, among.covariance[:, -1, -1] > 0, strict=True):
        joint, y = 4.0**octave * covariance, seen.mean[0]
        noisy, score = joint[:n, :n] + seen.covariance, 0.0
        for k in range(n):
            gain = np.linalg.solve(noisy[:k, :k], noisy[:k, k])
            sd = np.sqrt(noisy[k, k] - gain @ noisy[:k, k])
            score += stats.norm.logpdf(y[k], gain @ y[:k], sd)
        if bounded:
            gain = np.linalg.solve(noisy, joint[:n, -1])
            sd = np.sqrt(joint[-1, -1] - gain @ joint[:n, -1])
            score += stats.norm.logcdf(gain @ y / sd) - np.log(0.5)
        scores.append(score)
    weight = among.prior * np.exp(np.array(scores) - max(scores))
    names = np.array(among.names)
    drawn = paths.draw_paths(seen, np.array([[1.2]]), np.array([1.0]), 50, 0).weights
    level = weight[names == "level"].sum() / weight.sum()
    for name in dict.fromkeys(among.names):
        share = weight[names == name].sum() / weight.sum()
        if level < paths.LEVEL_FLOOR:
            factor = 1 / level if name == "level" else (1 - paths.LEVEL_FLOOR) / (1 - level) / paths.LEVEL_FLOOR
            share *= paths.LEVEL_FLOOR * factor
        assert drawn[name][0] == pytest.approx(share, rel=1e-6, abs=1e-12)


def test_a_law_is_drawn_from_its_truncated_posterior() -> None:
    """Beside draws that reject what is below 0, from the same normal."""
    rng = np.random.default_rng(0)
    root = np.tril(rng.normal(size=(3, 3)))
    mean = np.array([0.5, 1.0, -0.8])
    drawn = paths._truncated(mean[None], rng.standard_normal((40_000, 3)) @ root.T, root)[:, :2]
    plain = mean + rng.standard_normal((400_000, 3)) @ root.T
    kept = plain[plain[:, -1] > 0, :2]
    for level in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(drawn, level, 0), np.quantile(kept, level, 0), atol=0.05)


def test_runs_together_are_the_runs_alone() -> None:
    """What the benchmark measures on many runs at once is what a user is told about one."""
    rng = np.random.default_rng(3)
    gold = np.stack([BON, RL, 3 * D]) + rng.normal(0, 0.1, (3, POINTS))
    seen = standardised(gold, 0.1)
    steps = np.arange(1.0, 6)
    told = outlook(seen, onward(seen, steps), steps, level=0.95, draws=200, seed=0)
    room = gains(seen, onward(seen, steps), steps, level=0.95, draws=200, seed=0)
    for run, values in enumerate(gold):
        for one in forecast(series(values, 0.1, kl=False), draws=200):
            at = one.ahead - 1
            assert bool(one.not_identified) != told.identified[run, at]
            if told.identified[run, at]:
                assert (one.low, one.high) == pytest.approx((told.low[run, at], told.high[run, at]), rel=1e-6)
        found = headroom_within(series(values, 0.1, kl=False), version=10 * (POINTS + 4), draws=200)
        assert found.smooth_high == pytest.approx(room.smooth[1][run], rel=1e-6)


def test_persistence_is_a_local_level_by_maximum_likelihood() -> None:
    rng = np.random.default_rng(1)
    values = np.cumsum(rng.normal(0, 0.7, (3, 15)), 1) + rng.normal(size=(3, 15))
    level, spread = local_level(values)
    for run, curve in enumerate(values):
        oracle = sm.tsa.UnobservedComponents(curve, "local level")
        walk = spread[run, 1] ** 2
        found = oracle.smooth([1.0, walk])
        assert level[run] == pytest.approx(found.level.filtered[-1], rel=1e-3, abs=1e-3)
        assert spread[run, 0] ** 2 == pytest.approx(found.level.filtered_cov[-1], rel=1e-3)
        best = max(oracle.loglike([1.0, one**2]) for one in (1e-6, 0.2, 0.5, 0.8, 1.2, 2.0))
        assert oracle.loglike([1.0, max(walk, 1e-12)]) >= best - 0.05
    mean, sd = persistence(np.array([[0.0, 3.0, 0.0, 3.0]]), 1.0, np.array([1, 4]))["latest"]
    np.testing.assert_allclose(mean, [[3, 3]])
    np.testing.assert_allclose(sd, np.sqrt([[1 + 7, 1 + 4 * 7]]))


def test_the_benchmarks_truths_are_what_their_names_say() -> None:
    rng = np.random.default_rng(0)
    found = {name: truth(rng, 20) for name, truth in families().items()}
    for name in ("best-of-n law", "rl law", "kink", "cliff", "quadratic"):
        assert np.all(np.argmax(found[name], 1) == PEAK) and found[name][:, PEAK] == pytest.approx(1)
    for name in ("saturating", "plateau", "two-stage rise", "linear rise"):
        assert np.all(np.diff(found[name]) >= -1e-12) and found[name][:, PEAK] == pytest.approx(1)
    assert np.all(np.argmax(found["slow drift"], 1) <= PEAK // 2)
    assert np.all(np.abs(np.diff(found["slow drift"])[:, PEAK:]) < 0.03)
    assert np.all([np.any(np.diff(one[:PEAK]) < 0) for one in found["dip and recovery"]])


def test_a_fast_part_of_the_table() -> None:
    """Ahead of both kinds of persistence over the three horizons; the intervals hold the truth."""
    for name in ("best-of-n law", "plateau", "linear rise"):
        cell = measure(families()[name], 0.1, 0.75, 100, [0])
        score = {one: cell.horizons[one].mean() for one in HORIZON}
        assert score["crps"] < min(score["latest"], score["smoothed"]), name
        assert np.all(cell.horizons["covered"].mean(0) >= 0.95), name
        assert cell.headroom["headroom covered"].mean() >= 0.95, name
