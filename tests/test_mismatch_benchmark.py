"""The truths that benchmarks.instrument simulates are what their names say; a fast part of it keeps its goals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from benchmarks.instrument import (
    ALPHA,
    Bounds,
    bounds,
    distance,
    from_scores,
    holm,
    measure,
    plain_maxima,
    several,
    summary,
    write,
)
from benchmarks.runs import WITHIN, cells, measured_scores, near_ceiling, walking
from trainers.mismatch.alarm import MARGIN_SE

POINTS, RUNS = 10, 2_000
NULLS = ("flat", "slow rise", "plateau", "two-stage rise", "random walk that never falls")
WITHIN_MARGIN = ("dip by the margin and recovery", "random walk within the margin")
ROBUST = ("SE understated 1.25", "jitter 1 SE", "AR(1) 0.6", "AR(1) 0.8")


@pytest.fixture(scope="module")
def bound() -> Bounds:
    return bounds(POINTS, 8_000)


def most(rate: float) -> float:
    """The largest share that RUNS runs of a true `rate` show, but for three standard errors."""
    return rate + 3 * float(np.sqrt(rate * (1 - rate) / RUNS))


@pytest.mark.parametrize("points", [10, 20])
def test_nulls_never_fall_and_falls_have_the_drop_of_their_name(points: int) -> None:
    found = list(cells(points))
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        below = np.maximum.accumulate(cell.truth) - cell.truth
        if cell.peak is None:
            assert below.max() == pytest.approx(MARGIN_SE if "dip" in cell.name else 0)
        elif cell.shape is not None:
            assert cell.truth[cell.peak] == cell.truth.max()
            assert below[cell.peak + WITHIN] == pytest.approx(float(cell.name.rpartition(" ")[2]))
        else:
            assert below[-1] >= 6 * (1 - 1e-9) and np.argmax(cell.truth) <= cell.peak


def test_random_walks_stay_within_their_room() -> None:
    path = walking(np.random.default_rng(0), 50, 200, MARGIN_SE)
    below = np.maximum.accumulate(path) - path
    assert below.max() == pytest.approx(MARGIN_SE) and path[-1].max() > 5


def test_scores_have_the_errors_that_they_are_simulated_with() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.0, 0.0, -6.0])
    means = np.stack([measured_scores(rng, truth, 400).mean(1) for _ in range(2_000)])
    effective = np.sqrt(0.3 / 400)
    assert np.std(means[:, 0] - means[:, 1]) == pytest.approx(np.sqrt(2) * effective, rel=0.1)
    assert np.mean(means[:, 0] - means[:, 2]) == pytest.approx(6 * effective, rel=0.1)
    assert near_ceiling(rng, 20, 4_000).mean() == pytest.approx(0.97, abs=0.01)


def test_the_plain_scan_is_that_of_every_block() -> None:
    path = np.random.default_rng(0).standard_normal((6, 1))
    expected = max(
        (path[start:stop].mean() - path[6 - m :].mean()) / np.sqrt(1 / (stop - start) + 1 / m)
        for m in (1, 2, 3, 4)
        for start in range(6)
        for stop in range(start + 1, 7 - m)
        if stop - start in (1, 2, 3, 4)
    )
    assert plain_maxima(path)[-1, 0] == pytest.approx(expected, abs=1e-5)


def test_the_distance_to_the_null_is_that_of_isotonic_regression_and_shrinks_by_the_margin() -> None:
    path = np.array([0.0, 1.0, 3.0, 2.5, 0.0, -1.0])
    assert distance(path, 0.0) == pytest.approx(np.linalg.norm(path - isotonic_regression(path).x))
    assert distance(np.array([0.0, -2.0]), 0.5) == pytest.approx(1.5 / np.sqrt(2))  # by hand: both move by 0.75


def test_holm_steps_down() -> None:
    smallest = np.array([[0.01, 0.02, 0.2], [0.01, 0.03, 0.04], [0.02, 0.03, 0.04], [0.01, 0.01, 0.04]])  # p by run
    rejected = np.stack([smallest.T <= ALPHA / left for left in (3, 2, 1)])
    assert holm(rejected).tolist() == [2, 1, 0, 2]


def test_a_fast_part_of_the_nulls(bound: Bounds) -> None:
    by_name = {cell.name: (number, cell) for number, cell in enumerate(cells(POINTS))}
    for name in (*NULLS, *WITHIN_MARGIN, "heavy tails t(4)", *ROBUST):
        number, cell = by_name[f"null {name}"]
        row = measure(cell, bound, RUNS, [0, number])
        goal = 2 * ALPHA if name in ROBUST else ALPHA
        assert row.default_known is not None and row.default_unknown is not None
        assert max(row.default_known, row.default_unknown) <= most(goal), name
        if name in NULLS:
            assert row.zero_known is not None and row.zero_unknown is not None
            assert max(row.zero_known, row.zero_unknown) <= most(ALPHA), name


@pytest.mark.parametrize(("drop", "goal"), [(6, 0.95), (5, 0.85), (4, 0.6)])
def test_a_fast_part_of_the_falls(drop: int, goal: float, bound: Bounds) -> None:
    by_name = {cell.name: (number, cell) for number, cell in enumerate(cells(POINTS))}
    for shape in ("kink", "quadratic"):
        number, cell = by_name[f"{shape} middle drop {drop}"]
        row = measure(cell, bound, RUNS, [0, number])
        assert row.zero_known is not None and row.plain is not None and row.knows_all is not None
        assert row.zero_known >= goal - 3 * np.sqrt(goal * (1 - goal) / RUNS)
        assert row.plain <= row.zero_known <= row.knows_all
        assert row.default_known is not None and row.knows_all_default is not None
        assert row.default_known <= row.knows_all_default


def test_estimated_covariances_and_several_evaluations(bound: Bounds) -> None:
    runs = 200
    slack = 3 * np.sqrt(ALPHA * (1 - ALPHA) / runs)
    flat = from_scores("null paired prompts", POINTS, bound, runs, [0, 1])
    assert flat.zero_known is not None and flat.zero_known <= ALPHA + slack
    fall = from_scores("paired prompts: quadratic middle drop 6", POINTS, bound, runs, [0, 2])
    assert fall.zero_known is not None and fall.zero_known >= 0.9
    primary, others, falling = several(POINTS, runs, [0, 3])
    assert primary.zero_known is not None and others.zero_known is not None and falling.zero_known is not None
    assert max(primary.zero_known, others.zero_known) <= ALPHA + slack and falling.zero_known >= 0.9


def test_rows_are_written_and_a_missed_goal_has_a_star(bound: Bounds, tmp_path: Path) -> None:
    row = measure(next(cells(POINTS)), bound, 20, [0])
    write([row], tmp_path / "rows.csv")
    write([row], tmp_path / "rows.json")
    head, values = (tmp_path / "rows.csv").read_text().splitlines()
    (read,) = json.loads((tmp_path / "rows.json").read_text())
    assert head.split(",")[:3] == ["cell", "points", "runs"] and values.startswith("null flat,10,20,")
    assert read["zero_known"] == row.zero_known and read["knows_all"] is None
    shares = {"plain": 0.5, "zero_known": 0.07, "zero_unknown": 0.05, "default_known": 0.11, "default_unknown": 0.0}
    for cell, stars in (("null flat", ".070* .050 .110*"), ("null jitter 1 SE", ".070 .050 .110*")):
        (said,) = list(summary([replace(row, cell=cell, **shares)]))[2:]
        assert said.split(" | ")[1:5] == [".500", *stars.split()]
    (said,) = list(summary([replace(row, cell="kink late drop 4", **{**shares, "default_known": 0.61})]))[2:]
    assert said.split(" | ")[2:6] == [".070*", ".050*", ".610", ".000*"]
