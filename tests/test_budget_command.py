"""`headroom budget`: what a measured run says of the next one's evaluations, and what it cannot say."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.__main__ import main
from cluster.budget import Asked, plan, text
from configs.errors import UserError
from tests.test_watch import csv, jsonl, refused, scores
from trainers.measured import MeasuredRun
from trainers.mismatch import Series, Settings, Wanted, evaluation_budget, from_means, from_scores, scatter
from trainers.sources import read

FAST = Settings(runs=2_000)
SIX = replace(FAST, planned=6)


@pytest.fixture
def measured(tmp_path: Path) -> MeasuredRun:
    """A table of scores (10 versions, 200 prompts): between prompts 1, at one version besides 0.3."""
    rows = [{"version": 10 * i, "reward": i / 10, "gold": row.tolist()} for i, row in enumerate(scores())]
    (tmp_path / "run.jsonl").write_text(jsonl(*rows))
    return read(str(tmp_path / "run.jsonl"))


def test_scatter_is_that_of_the_scores() -> None:
    of = scores()
    found = scatter(from_scores("gold", range(10), of))
    assert found.score_sd == pytest.approx(np.sqrt(of.var(1, ddof=1).mean()), rel=1e-12)
    covariance = np.cov(of)
    apart = covariance[~np.eye(10, dtype=bool)].mean() / np.diag(covariance).mean()
    assert found.correlation == pytest.approx(apart, rel=1e-12)
    assert (found.prompts, found.versions) == (200, 10)
    alone = scatter(from_means("gold", [0, 1], [0.0, 1.0], [0.1, 0.2]), prompts=400)
    assert alone.score_sd == pytest.approx(20 * np.sqrt((0.1**2 + 0.2**2) / 2), rel=1e-12)
    assert alone.correlation == pytest.approx(0, abs=1e-12)
    assert scatter(from_scores("gold", [5], of[:1])).correlation == 0


def test_the_plan_is_the_evaluation_budget_of_what_was_measured(measured: MeasuredRun) -> None:
    timed = replace(measured, prompt_seconds=2.0, planned=8)
    of = plan(timed, Asked(drop=0.2, base_rate=0.1), FAST)
    found = scatter(measured.series.primary)
    wanted = Wanted(drop=0.2, score_sd=found.score_sd, correlation=found.correlation, base_rate=0.1, prompt_cost=2.0)
    assert of.budget == evaluation_budget(wanted, FAST, [6, 8, 10, 20, 50])
    assert [option.evaluations for option in of.budget.options] == [6, 8, 10, 20, 50] and of.length == 90
    said, six = text(of), of.budget.options[0]
    assert re.search(rf"^ *6 +18 versions +{six.prompts} ", said, re.M)
    assert f"{round(six.cost / 60)} min" in said and f"{six.cost:g}" == f"{6 * 2 * six.prompts:g}"
    assert of.budget.chosen is not None
    assert f"cheapest in time: {of.budget.chosen.evaluations} evaluations of {of.budget.chosen.prompts} prompts" in said
    assert "if 10 % of runs fall so far, at least 64 % of alarms are real" in said  # .1 * .8 / (.1 * .8 + .9 * .05)


def test_the_plan_finds_the_drop_in_runs_like_this_one(measured: MeasuredRun) -> None:
    """The alarm of a flat run with so many prompts states that drop, and of one with fewer a larger one."""
    [six] = plan(measured, Asked(drop=0.2), SIX).budget.options
    assert six.detectable_drop <= 0.2 and six.prompts < 200
    [finer] = plan(measured, Asked(drop=0.1), SIX).budget.options
    assert 3 * six.prompts < finer.prompts < 6 * six.prompts  # four times, but for the widening of few prompts


def test_without_times_costs_are_prompts_and_a_missed_delay_is_said(measured: MeasuredRun) -> None:
    said = text(plan(measured, Asked(drop=0.2, within=0.2), SIX))
    assert "no times of evaluations are known" in said and "cheapest" not in said
    assert "the fall is seen after 60% of the run at best, 20% are allowed: evaluate more often" in said
    assert re.search(r"\d+ prompts$", said, re.M)


def test_what_is_not_known_is_said(measured: MeasuredRun) -> None:
    one = replace(measured, series=read_first(measured))
    assert "was measured at one version" in text(plan(replace(one, final_version=90), Asked(drop=0.2), SIX))
    with pytest.raises(UserError, match="has 1 versions: too few for 6 evaluations"):
        plan(one, Asked(drop=0.2), SIX)
    flat = from_scores("gold", range(8), np.ones((8, 20)))
    with pytest.raises(UserError, match="all prompts of gold score the same"):
        scatter(flat)


def read_first(measured: MeasuredRun) -> Series:
    series = measured.series
    first = series.primary.at(series.primary.versions[:1])
    return replace(series, evaluations=(first,))


def test_it_is_typed_like_this_and_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.csv").write_text(csv())
    typed = ["budget", "run.csv", "--detect", "0.2"]
    assert main([*typed, "--prompts", "100", "--planned", "10", "--power", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert "with a probability of 90 %" in printed and "a standard deviation of 0.50" in printed
    assert re.search(r"^ *10 +10 versions", printed, re.M)
    refused(typed, ["how many prompts stand behind gold_se", "--prompts"], capsys)
    for wrong, says in (
        (["--prompts", "0"], "--prompts 0"),
        (["--prompts", "100", "--power", "1"], "power 1.0"),
        (["--prompts", "100", "--base-rate", "2"], "base_rate 2.0"),
        (["--prompts", "100", "--margin", "0.3"], "a margin of 0.3 hides a drop of 0.2"),
        (["--prompts", "100", "--planned", "4"], "4 evaluations are too few"),
    ):
        refused([*typed, *wrong], [says], capsys)
    refused(["budget", "run.csv"], ["--detect", "headroom budget --help"], capsys)
    refused(["budget", "run.csv", "--detect", "-1", "--prompts", "9"], ["drop -1.0", "positive"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]
