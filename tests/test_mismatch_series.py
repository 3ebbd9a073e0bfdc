"""What the instrument reads: tables and records, paired covariance, and refusals in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm

from configs.errors import UserError
from trainers.mismatch import from_means, from_records, from_scores, from_table
from trainers.records import read_evaluations, write_evaluations
from trainers.types import Evaluation

TABLE = {
    "version": [0, 10, 20],
    "reward": ["0.1", "0.4", "0.6"],
    "kl": [0.0, 1.0, 2.0],
    "gold": [1.0, None, 1.1],
    "gold_se": [0.1, "", 0.2],
}


def with_column(**columns: list[Any]) -> dict[str, Any]:
    return {**TABLE, **columns}


def test_a_table_becomes_curves_and_what_is_missing_stays_missing() -> None:
    series = from_table(TABLE, evaluations=["gold"], kl="kl")
    assert series.primary.versions.tolist() == [0, 20] and series.primary.mean.tolist() == [1.0, 1.1]
    assert series.primary.se is not None and np.allclose(series.primary.se, [0.1, 0.2], rtol=1e-12)
    assert series.reward.mean.tolist() == [0.1, 0.4, 0.6] and series.reward.covariance is None
    assert series.kl is not None and series.kl.versions.tolist() == [0, 10, 20]


@pytest.mark.parametrize(
    ("table", "evaluations", "says"),
    [
        (with_column(version=[0, 10, 10]), ["gold"], "version 10 twice"),
        (with_column(version=[0, 20, 10]), ["gold"], "version 10 after version 20"),
        (with_column(version=[0, 1.5, 2]), ["gold"], "row 2: 1.5 is no policy version"),
        (with_column(gold=[1.0, float("nan"), 1.1]), ["gold"], "gold is nan at version 10"),
        (with_column(reward=["a", 1, 2]), ["gold"], "reward is 'a' at version 0"),
        (with_column(gold_se=[0.1, None, None]), ["gold"], "version 20 has gold but no gold_se"),
        (with_column(gold_se=[0.1, None, 0.0]), ["gold"], "not positive at version 20"),
        (with_column(gold=[None, None, None]), ["gold"], "no evaluations"),
        (with_column(gold=[1.0]), ["gold"], "differ in length"),
        (TABLE, [], "no evaluations"),
        (TABLE, ["golb"], "no column golb: the columns are version, reward, kl, gold, gold_se"),
        (TABLE, ["gold", "gold"], "same name"),
    ],
)
def test_bad_tables_are_refused_in_one_line(table: dict[str, Any], evaluations: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        from_table(table, evaluations=evaluations)
    assert "\n" not in str(error.value)


def test_paired_covariance_is_the_sample_covariance_of_the_prompts() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 50)) + rng.normal(size=50)
    curve = from_scores("gold", [0, 1, 2, 3], scores)
    assert curve.covariance is not None and curve.prompts == 50
    np.testing.assert_allclose(curve.covariance, np.cov(scores) / 50, atol=1e-10)
    np.testing.assert_allclose(curve.mean, scores.mean(1), atol=1e-10)


def test_clustered_covariance_equals_statsmodels() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    scores = rng.normal(size=(3, len(clusters))) + rng.normal(size=12)[clusters]
    curve = from_scores("gold", [0, 1, 2], scores, clusters)
    version = np.repeat(np.eye(3), len(clusters), axis=0)
    fit = sm.OLS(scores.ravel(), version).fit(
        cov_type="cluster", cov_kwds={"groups": np.tile(clusters, 3), "use_correction": False}
    )
    assert curve.covariance is not None and curve.prompts == 12
    np.testing.assert_allclose(curve.covariance, fit.cov_params() * 12 / 11, atol=1e-10)


def test_undefined_scores_leave_out_the_prompt_or_the_version_and_are_noted() -> None:
    scores = np.random.default_rng(2).normal(size=(3, 10))
    scores[0, 3] = np.nan
    scores[2, :6] = np.nan
    curve = from_scores("gold", [0, 1, 2], scores)
    assert curve.versions.tolist() == [0, 1]
    np.testing.assert_allclose(curve.mean, np.delete(scores[:2], 3, 1).mean(1), atol=1e-12)
    assert curve.notes == (
        "version 2 left out: most of its scores are undefined",
        "1 of 10 prompts left out: undefined at some version",
    )


def evaluation(version: int, scores: list[float], uids: tuple[str, ...] = ("a", "b", "c")) -> Evaluation:
    return Evaluation(
        version=version, task="held/out", prompt_uids=uids, scores={"x": np.array(scores, np.float32)}, samples=()
    )


def test_records_become_paired_curves_with_the_primary_first(tmp_path: Path) -> None:
    for version in (0, 5):
        both = [evaluation(version, [1.0, 2.0, 4.0 + version])]
        second = Evaluation(
            version=version, task="b", prompt_uids=("p", "p", "q"), scores={"y": both[0].scores["x"]}, samples=()
        )
        write_evaluations(tmp_path, [second])
        records = read_evaluations(tmp_path)
    records = {version: [*found, evaluation(version, [1.0, 2.0, 4.0 + version])] for version, found in records.items()}
    series = from_records(records, reward=from_means("reward", [0, 5], [0, 1], None), primary="held/out/x")
    assert [curve.name for curve in series.evaluations] == ["held/out/x", "b/y"]
    assert [curve.prompts for curve in series.evaluations] == [3, 2]
    with pytest.raises(UserError, match=r"evaluation z is not in the records: they have b/y, held/out/x"):
        from_records(records, reward=series.reward, primary="z")


def test_changed_prompts_are_refused() -> None:
    records = {0: [evaluation(0, [1, 2, 3])], 5: [evaluation(5, [1, 2, 3], ("a", "b", "d"))]}
    with pytest.raises(UserError, match=r"versions 0 and 5 were evaluated on different prompts \(2 of 3 shared\)"):
        from_records(records, reward=from_means("reward", [0], [0], None))
