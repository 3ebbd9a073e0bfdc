"""The paired statistics of `benchmarks.across_seeds` against scipy and known truths."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.across_seeds import aligned, at_matched_length, changes, load, paired
from trainers.records import write_evaluations
from trainers.rundir import RunDir
from trainers.types import Evaluation


def test_a_paired_change_has_students_interval() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=40)
    after = before + rng.normal(0.3, 0.5, 40)
    change = paired(before, after)
    interval = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (change.low, change.high) == pytest.approx((interval.low, interval.high))
    assert change.mean == pytest.approx((after - before).mean())


@pytest.mark.parametrize("truth", [0.0, 0.4])
def test_what_length_alone_brought_is_taken_out(truth: float) -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        longer = rng.normal(5, 4, 120)
        change = at_matched_length(truth + 0.2 * longer + rng.normal(size=120) * (0.5 + 0.1 * abs(longer)), longer)
        assert change.low is not None and change.high is not None
        covered += change.low <= truth <= change.high
    assert 180 <= covered <= 199  # 95 % of 200, four standard errors either way


def test_without_a_change_of_length_it_is_the_paired_change() -> None:
    rng = np.random.default_rng(1)
    change = rng.normal(size=30)
    assert at_matched_length(change, np.full(30, 2.0)) == paired(np.zeros(30), change)


@pytest.mark.filterwarnings("error")
def test_the_table_reads_run_directories_and_pairs_by_prompt(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = RunDir(tmp_path / f"s{seed}").create()
        for version, gain in ((0, 0.0), (4, 1.0)):
            order = ["a", "b", "c"] if seed == 0 else ["c", "a", "b"]
            base = {"a": 0.0, "b": 1.0, "c": 2.0}
            scores = {
                "reward": np.array([base[uid] + gain for uid in order], np.float32),
                "length": np.array([3, 3, np.nan], np.float32),
            }
            result = Evaluation(version=version, task="held", prompt_uids=tuple(order), scores=scores, samples=())
            write_evaluations(run.evaluations, [result])
    runs = [load(tmp_path / f"s{seed}") for seed in (0, 1)]
    before, after = aligned(runs, "held/reward", 0, 4)
    assert before.tolist() == [[0, 1, 2]] * 2 and (after - before == 1).all()
    assert aligned(runs, "held/length", 0, 4)[0].shape == (2, 1)  # only "a" has one in both
    table = changes(runs, "held/length")
    assert len({row.count("|") for row in table}) == 1
    row = next(row for row in table if "`held/reward`" in row)
    assert row.split(" | ")[1:6] == ["3", "1.000", "2.000", "+1.000, +1.000", "+1.000 [+1.000, +1.000]"]
    alone = next(row for row in table if "`held/length`" in row)
    assert alone.split(" | ")[5] == "+0.000 (no interval)"  # one prompt has no spread
