"""Correlations: equal to scipy where there is no error, corrected where there is, silent where nothing can be said."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.coverage import correlations, gaps, shares
from trainers.mismatch import Correlation, Series, between, correlate, from_means

POINTS = 12
VERSIONS = list(range(POINTS))
TIME = np.linspace(0, 1, POINTS)
SCIPY = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}


def pair(
    x: np.ndarray, y: np.ndarray, x_se: float | None = None, y_se: float | None = None, *, draws: int = 100
) -> dict[str, Correlation]:
    curves = [
        from_means(name, range(len(values)), values.tolist(), None if se is None else [se] * len(values))
        for name, values, se in (("reward", x, x_se), ("gold", y, y_se))
    ]
    return {one.kind: one for one in between(*curves, draws=draws)}


def test_without_errors_all_three_equal_scipy_ties_included() -> None:
    rng = np.random.default_rng(0)
    for x, y in ((rng.normal(size=15), rng.normal(size=15)), (rng.integers(0, 4, 15), rng.integers(0, 4, 15))):
        for kind, one in pair(x.astype(float), y.astype(float)).items():
            truth = SCIPY[kind](x, y).statistic
            assert one.measured == pytest.approx(truth, abs=1e-10)
            assert (one.estimate, one.low, one.high) == pytest.approx((truth,) * 3, abs=1e-10)
            assert "taken as exact" in one.estimand


def test_errors_are_corrected_for() -> None:
    rng = np.random.default_rng(1)
    time = np.linspace(0, 1, 200)
    found = pair(time + rng.normal(0, 0.2, 200), time + rng.normal(0, 0.2, 200), 0.2, 0.2, draws=20)["pearson"]
    assert found.measured is not None and found.measured < 0.8
    assert found.estimate == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize(
    "y",
    [TIME, TIME + 0.3 * np.sin(12 * TIME), np.where(TIME < 0.7, TIME, 1.43 - 1.1 * TIME), -np.sqrt(TIME)],
    ids=["rising", "wave", "fall", "falling"],
)
def test_coverage_of_the_true_correlation(y: np.ndarray) -> None:
    rng, runs = np.random.default_rng(2), 150
    x = TIME + 0.15 * np.sin(5 * TIME)
    truth = {kind: of(x, y).statistic for kind, of in SCIPY.items()}
    covered = dict.fromkeys(truth, 0)
    for _ in range(runs):
        found = pair(x + rng.normal(0, 0.03, POINTS), y + rng.normal(0, 0.08, POINTS), 0.03, 0.08, draws=200)
        for kind, one in found.items():
            assert one.low is not None and one.high is not None
            covered[kind] += one.low - 1e-9 <= truth[kind] <= one.high + 1e-9
    slack = 2 * np.sqrt(0.05 * 0.95 / runs)
    assert all(covered[kind] / runs >= 0.93 - slack for kind in truth), covered


def test_agreement_throughout_is_within_reach_only_where_the_errors_allow_it() -> None:
    rng = np.random.default_rng(4)
    blurred = TIME + rng.normal(0, 0.1, POINTS)
    for sign in (1, -1):
        may = pair(TIME, sign * blurred, 0.03, 0.1, draws=300)["kendall"]
        assert may.measured is not None and may.low is not None and may.high is not None
        assert abs(may.measured) < 1 and (may.high if sign == 1 else may.low) == sign
        wave = pair(TIME, sign * (TIME + 0.3 * np.sin(12 * TIME)), 0.01, 0.02, draws=300)
        for kind in ("spearman", "kendall"):
            low, high = wave[kind].low, wave[kind].high
            assert low is not None and high is not None and -1 < low <= high < 1


def test_a_fast_part_of_the_coverage() -> None:
    cells = [*itertools.islice(correlations(60), 6), *itertools.islice(gaps(60), 3), *itertools.islice(shares(60), 2)]
    assert {cell.number for cell in cells} >= {"pearson", "kendall", "gap", "length's share, curves"}
    for cell in cells:
        assert cell.silent < 0.1 and 0 < cell.width < 1
        assert cell.coverage >= 0.93 - 2 * np.sqrt(0.05 * 0.95 / cell.runs), cell


def test_not_enough_is_said_with_its_reason() -> None:
    rng = np.random.default_rng(3)
    cases = (
        (pair(TIME[:4], TIME[:4]), "4 versions have both"),
        (pair(TIME, np.full(POINTS, 0.3)), "gold is constant"),
        (pair(TIME, rng.normal(size=POINTS), None, 1.5), "is measurement error"),
    )
    for found, reason in cases:
        for one in found.values():
            assert one.not_enough is not None and reason in one.not_enough
            assert one.measured is one.estimate is one.low is one.high is None


def test_every_pair_and_every_window_is_there() -> None:
    reward = from_means("reward", VERSIONS, TIME.tolist(), None)
    kl = from_means("kl", VERSIONS[1:], TIME[1:].tolist(), None)
    gold = from_means("gold", VERSIONS, (TIME * (1 - TIME)).tolist(), [0.01] * POINTS)
    series = Series(reward=reward, evaluations=(gold,), kl=kl)
    assert [(one.x, one.y, one.n) for one in correlate(series, draws=50)[::3]] == [
        ("reward", "gold", 12),
        ("kl", "gold", 11),
    ]
    windows = [one for one in correlate(series, window=6, draws=50) if one.kind == "spearman" and one.x == "reward"]
    assert [(one.first_version, one.last_version) for one in windows] == [(v, v + 5) for v in range(7)]
    assert windows[0].estimate == pytest.approx(1, abs=0.1) and windows[-1].estimate == pytest.approx(-1, abs=0.1)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), shift=st.floats(-1e2, 1e2))
def test_coefficients_do_not_depend_on_units(seed: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=POINTS), TIME + rng.normal(0, 0.1, POINTS)
    base, moved = pair(x, y, 0.2, 0.05), pair(x, scale * y + scale * shift, 0.2, 0.05 * scale)
    flipped = pair(x, -y, 0.2, 0.05)
    for kind, one in base.items():
        same = (one.measured, one.estimate, one.low, one.high)
        assert (moved[kind].measured, moved[kind].estimate, moved[kind].low, moved[kind].high) == pytest.approx(
            same, abs=1e-6
        )
        assert one.measured is not None and flipped[kind].measured == pytest.approx(-one.measured, abs=1e-9)
