"""Early warnings: what they are blind to, what they see, and that a stated rate of false ones is kept."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.early import ALPHA, QUANTITIES, false_warnings, families
from cluster.__main__ import main
from tests.test_watch import answers, jsonl
from trainers.mismatch import Curve, from_means, scan
from trainers.mismatch.early import FEWEST, LATEST, SHORTEST, Early, between, departure, null, warn

WALKS = arrays(np.float64, (14, 1), elements=st.floats(-1, 1))


def oracle(values: np.ndarray, look: int) -> float:
    """The same by numpy's least squares and the textbook's error of a forecast."""
    found = 0.0
    for latest in range(SHORTEST, min(LATEST, look + 1 - FEWEST) + 1):
        n = look + 1 - latest
        design = np.stack([np.ones(n), np.arange(n)], 1)
        theta, *_ = np.linalg.lstsq(design, values[:n], rcond=None)
        noise = np.sqrt(np.sum((values[:n] - design @ theta) ** 2) / (n - 2))
        at = np.array([1.0, look - (latest - 1) / 2])
        ends = sorted([theta @ [1.0, n - 1], theta @ at])
        now = values[n : look + 1].mean()
        error = noise * np.sqrt(1 / latest + at @ np.linalg.inv(design.T @ design) @ at)
        found = max(found, (ends[0] - now) / error, (now - ends[1]) / error)
    return found


def test_it_is_the_error_of_a_forecast_by_a_line() -> None:
    values = np.random.default_rng(0).normal(size=(16, 5)).cumsum(0)
    found = departure(values)
    for look in range(16):
        for run in range(5):
            assert found[look, run] == pytest.approx(oracle(values[:, run], look), rel=1e-9, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(WALKS, st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([-1, 1]))
def test_unit_level_sign_and_points_to_come_change_nothing(
    walk: np.ndarray, level: float, unit: float, sign: int
) -> None:
    values = walk + np.random.default_rng(1).normal(size=walk.shape)
    found = departure(values)
    np.testing.assert_allclose(departure(level + sign * unit * values), found, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(departure(values[:10]), found[:10], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", [lambda t: 0 * t, lambda t: 3 - 2 * t, lambda t: 5 * np.exp(-t / 4)])
def test_a_smooth_way_is_no_departure(way: object) -> None:
    assert callable(way)
    assert departure(way(np.arange(40.0))[:, None]).max() < 2


def quantity(values: Sequence[float], every: int = 4) -> Curve:
    versions = range(1, every * len(values) + 1)
    rng = np.random.default_rng(0)
    return from_means("entropy", versions, (np.repeat(values, every) + rng.normal(0, 1, len(versions))).tolist(), None)


def asked(curve: Curve, points: int, planned: int | None = None) -> Early:
    evaluated = np.arange(0, 4 * points + 1, 4)
    return warn([("entropy", curve)], evaluated, alpha=0.05, planned=planned, runs=2_000, seed=0)[0]


def test_a_change_is_warned_of_soon_and_a_drift_never() -> None:
    way = np.linspace(0, 10, 20)
    assert asked(quantity(way.tolist()), 20).warned is None
    for change in (-12.0, 12.0):
        found = asked(quantity((way + change * (np.arange(20) >= 12)).tolist()), 20, planned=21)
        assert found.warned in (52, 56, 60) and found.false_warning_rate == 0.05, "the change begins with version 49"


def test_what_cannot_be_judged_says_why() -> None:
    assert asked(quantity([0.0] * 5), 5).not_enough == "not enough: 5 evaluated versions have it, 8 are needed"
    still = from_means("truncated", range(1, 81), [0.0] * 80, None)
    assert asked(still, 20).not_enough == "it has not varied"
    none = from_means("entropy", [], [], None)
    assert "0 evaluated versions" in str(asked(none, 20).not_enough)


def test_one_count_after_many_zeros_is_no_warning() -> None:
    counts = [0.0] * 60 + [1 / 512, 2 / 512] + [0.0] * 18
    assert asked(from_means("truncated", range(1, 81), counts, None), 20).warned is None
    risen = [0.0] * 58 + [1 / 512, 0.0] + [0.3 + k / 512 for k in range(20)]
    assert asked(from_means("truncated", range(1, 81), risen, None), 20).warned in (64, 68, 72)


def test_points_are_means_since_the_evaluation_before() -> None:
    curve = from_means("entropy", [1, 2, 3, 4, 9, 11], [1.0, 3.0, 6.0, 8.0, 5.0, 99.0], None)
    versions, values, grains = between(curve, np.array([0, 2, 4, 8, 10]))
    assert versions.tolist() == [2, 4, 10] and values.tolist() == [2.0, 7.0, 5.0] and grains.tolist() == [2.0, 2.0, 1.0]


def test_quantities_share_the_rate() -> None:
    found = warn([("a", quantity([0.0] * 20))] * 5, np.arange(0, 81, 4), alpha=0.05, planned=None, runs=2_000, seed=0)
    assert [one.false_warning_rate for one in found] == pytest.approx([0.01] * 5)


def test_a_fast_part_of_the_table_keeps_the_rate() -> None:
    points = 20
    maxima = null(points, 8_000, 0)
    for planned in (points, None):
        bound = scan.boundary(maxima, ALPHA / QUANTITIES, planned)
        for family in families(points):
            if "by the rule" in family.name or "0.8" in family.name:
                continue
            assert false_warnings(family, bound, 1_000, [1, points])[0] <= 0.065, family.name  # 0.05 and 2 of its SE


def test_an_early_warning_stands_apart_from_the_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"version": i, "reward": i / 10, "gold": 0.5 + i / 50, "gold_se": 0.05, "kl": i / 50 + rng.normal(0, 0.01),
         "entropy": 2 - i / 40 - (i >= 12) + rng.normal(0, 0.02)} for i in range(20)
    ]  # fmt: skip
    run = str(tmp_path / "run.jsonl")
    Path(run).write_text(jsonl(*rows))
    found = answers([run], capsys)
    entropy, kl = found["early_warnings"]
    assert found["state"] == "aligned" and kl["warned_version"] is None
    assert (entropy["kind"], entropy["quantity"], kl["kind"]) == ("entropy", "entropy", "KL")
    assert entropy["warned_version"] in (12, 13, 14) and entropy["false_warning_rate"] == 0.025
    said = f"warning at version {entropy['warned_version']}"
    assert main(["watch", run, "--once"]) == 0
    assert f"early: entropy {said}, false in at most 2.5 % of runs" in re.sub(" +", " ", capsys.readouterr().out)
    assert main(["report", run, "--text"]) == 0
    told = capsys.readouterr().out
    assert said in told and "at most 2.5 % of runs" in told and "no warning; KL" in told
