"""One run as the instrument sees it: the reward's standard errors, and what may warn before an evaluation does."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from cluster.report.view import band
from tests.test_watch import ROOT
from trainers.measured import Columns, Kind, Logged, MeasuredRun, early_columns, from_headroom
from trainers.mismatch import Settings, length_share
from trainers.mismatch.series import MOST_MEASURED
from trainers.sources import read
from trainers.types import Evaluation
from trainers.watcher import judge_run

FAST = Settings(runs=2_000)
EVALUATED = range(0, 81, 10)
SE = 0.05


def run(errors: Sequence[tuple[int, float]] | None, steps: int = 80, *, length: bool = False) -> MeasuredRun:
    """A run of Headroom whose reward rises while gold falls after version 40, with `reward/mean_se` as given."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 1, 50)
    records = {}
    for version in EVALUATED:
        scores = {"gold": prompts + min(version, 80 - version) / 20 + rng.normal(0, 0.2, 50)}
        if length:
            scores["length"] = 20 + version / 4 + 3 * np.sin(version) + prompts
        uids = tuple(f"p{place}" for place in range(50))
        kept = {name: values.astype(np.float32) for name, values in scores.items()}
        records[version] = [Evaluation(version=version, task="task", prompt_uids=uids, scores=kept, samples=())]
    metrics = {
        "reward/mean": [(version, version / 20 + rng.normal(0, SE)) for version in range(1, steps + 1)],
        "rollout/length_mean": [(version, 20 + rng.normal(0, 1)) for version in range(1, steps + 1)],
        "reward/tail": [(version, 1.75 + rng.normal(0, 0.1)) for version in range(1, steps + 1)],
    } | ({} if errors is None else {"reward/mean_se": errors})
    logged = Logged(params={"evaluation.primary": "task/gold"}, tags={}, metrics=metrics, records=records)
    return from_headroom("mine", "run", logged, Columns())


def test_the_reward_of_a_run_has_its_standard_errors() -> None:
    errors = [(version, SE + version / 1_000) for version in range(1, 81)]
    reward = run(errors).series.reward
    assert reward.covariance is not None and reward.se is not None
    np.testing.assert_allclose(reward.se, [error for _, error in errors], rtol=1e-12)
    assert np.count_nonzero(reward.covariance) == 80, "batches are independent"
    assert band(reward) is not None


def test_with_them_it_is_corrected_and_without_them_it_is_taken_as_exact() -> None:
    known, not_known = (judge_run(run(errors), FAST) for errors in ([(v, SE) for v in range(1, 81)], None))
    assert known.verdict.state == not_known.verdict.state == "parted"
    first, other = known.correlations[0], not_known.correlations[0]
    assert first.x == other.x == "reward/mean" and first.measured == pytest.approx(other.measured or 0, rel=1e-12)
    assert "taken as exact" in other.estimand and "taken as exact" not in first.estimand
    assert first.estimate is not None and other.estimate is not None and abs(first.estimate) > abs(other.estimate)
    assert not any("second differences" in reason for reason in known.reasons)
    assert any("second differences" in reason for reason in not_known.reasons)


def test_an_error_of_0_is_kept() -> None:
    reward = run([(version, SE * (version % 2)) for version in range(1, 81)]).series.reward
    assert reward.se is not None and reward.se.tolist() == [SE, 0.0] * 40


def test_errors_of_some_versions_are_not_used_and_told() -> None:
    of = run([(version, SE) for version in range(41, 81)])
    assert of.series.reward.covariance is None and len(of.series.reward.versions) == 80
    said = "reward/mean: no standard error is used: 40 of 80 versions have one"
    assert any(reason.startswith(said) for reason in judge_run(of, FAST).reasons)


def test_a_run_that_is_too_long_for_them_is_read_without() -> None:
    steps = MOST_MEASURED + 1
    reward = run([(version, SE) for version in range(1, steps + 1)], steps).series.reward
    assert len(reward.versions) == steps and reward.covariance is None and "5,000 at most" in reward.notes[0]


def test_a_table_has_them_by_the_same_name_and_others_have_none(tmp_path: Path) -> None:
    rows = [f"{10 * i},{i / 10},0.02,{i % 4},0.1" for i in range(8)]
    (tmp_path / "run.csv").write_text("\n".join(["version,reward/mean,reward/mean_se,gold,gold_se", *rows]))
    of = read(str(tmp_path / "run.csv"))
    assert of.series.reward.se is not None and of.series.reward.se == pytest.approx([0.02] * 8)
    assert [curve.name for curve in of.series.evaluations] == ["gold"], "the reward's error makes it no evaluation"
    (tmp_path / "run.csv").write_text("\n".join(["version,reward/mean,reward/other_se,gold,gold_se", *rows]))
    assert read(str(tmp_path / "run.csv")).series.reward.covariance is None
    assert run(None).series.reward.covariance is None


def test_length_is_not_that_of_the_rollouts_that_the_reward_is_the_mean_of() -> None:
    errors = [(version, SE) for version in range(1, 81)]
    assert "no length is known" in str(judge_run(run(errors), FAST).length.not_enough)
    of = run(errors, length=True)
    assert of.length is not None and of.length.name == "task/length" and of.length.covariance is not None
    found, oracle = judge_run(of, FAST).length, length_share(of.series, of.length)
    assert found == oracle and "task/length" in found.name


def test_the_names_of_early_warnings() -> None:
    names = ["reward/mean", "reward/mean_se", "reward/std", "reward/tail", "reward/disagreement", "reward/tail/mean"]
    assert early_columns(names) == {
        "reward/std": "reward spread",
        "reward/tail": "reward tail",
        "reward/disagreement": "ensemble disagreement",
    }
    assert [one.kind for one in run(None).early_warnings] == ["reward tail", "length"]
    documented = (ROOT / "docs" / "watch.md").read_text()
    assert all(f"`{kind}`" in documented for kind in get_args(Kind))
