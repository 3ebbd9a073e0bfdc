"""What is kept of one run of the demo's world, and the page that is made of many."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import demo_report
from benchmarks.demo_plan import SEEDS, jobs
from benchmarks.demo_queue import Results
from benchmarks.demo_record import agreement, alarm_of, as_hf, branch, golds_of, outcome, told, untouched
from benchmarks.demo_seeds import after, checkpoints, fresh
from tests.ranks import random_batch, recipe, tiny_policy
from trainers import world
from trainers.checkpoint import find_latest, save
from trainers.learner import Learner
from trainers.mismatch import from_means, from_scores
from trainers.records import write_evaluations
from trainers.rundir import RunDir
from trainers.types import Evaluation

PRIMARY = "eval/helpdesk/gold"


def spoken(version: int, trained: int, state: str, since: int | None) -> list[dict[str, Any]]:
    """Return the records that a run leaves when it has judged a version."""
    return [
        {"kind": "metric", "key": "time/step", "step": trained, "value": 1.0},
        {"kind": "metric", "key": PRIMARY, "step": version, "value": 0.3},
        {"kind": "tag", "key": "alarm.state", "value": state},
        {"kind": "tag", "key": "alarm.since_version", "value": str(since)},
    ]


def test_what_a_run_said_is_read_in_order_and_a_resume_takes_back_what_came_after() -> None:
    began = {"kind": "metric", "key": "run/incarnation", "step": 0, "value": 0.0}
    resumed = {"kind": "metric", "key": "run/incarnation", "step": 10, "value": 1.0}
    first = [began, *spoken(4, 5, "None", None), *spoken(8, 9, "aligned", 8), *spoken(12, 14, "parted", 8)]
    row = {"version": 12, "trained": 14, "state": "parted", "since": 8}
    assert alarm_of(told(first, PRIMARY)) == row
    again = told([*first, resumed, *spoken(12, 13, "aligned", 8), *spoken(16, 17, "decayed", 12)], PRIMARY)
    assert [(one["version"], one["state"]) for one in again] == [(8, "aligned"), (12, "aligned"), (16, "decayed")]
    assert alarm_of(again) == {"version": 16, "trained": 17, "state": "decayed", "since": 12}
    assert alarm_of(told(first[:5], PRIMARY)) is None


def test_shares_of_the_gain_by_hand() -> None:
    mean = [0.2, 0.3, 0.4, 0.35, 0.1]
    truth = from_means("gold", [0, 4, 8, 12, 16], mean, [1e-4] * 5)
    found = outcome(truth, {"chosen": 12, "last": 16, "highest reward": 8, "not evaluated": 20, "none": None}, None)
    assert found["at_alarm"] is None
    assert found["peak_version"] == 8 and found["rose"] and found["fell"]
    assert found["rise"] == pytest.approx({"value": 0.2, "se": 1e-4 * 2**0.5})
    assert found["fall"] == pytest.approx({"value": 0.3, "se": 1e-4 * 2**0.5})
    assert found["kept"] == pytest.approx({"chosen": 0.75, "last": -0.5, "highest reward": 1.0}, abs=0.01)
    falling = outcome(
        from_means("gold", [0, 4, 8], [0.4, 0.3, 0.1], [1e-4] * 3), {"chosen": 0}, {"since": 0, "version": 8}
    )
    assert (falling["rose"], falling["fell"], falling["kept"]) == (False, True, None)
    assert falling["at_alarm"] == pytest.approx({"value": -0.3, "se": 1e-4 * 2**0.5})
    rising = outcome(
        from_means("gold", [0, 4, 8], [0.1, 0.3, 0.4], [1e-4] * 3), {"chosen": 8}, {"since": 2, "version": 8}
    )
    assert (rising["rose"], rising["fell"], rising["at_alarm"]) == (True, False, None)


def test_a_flat_curve_neither_rises_nor_falls_more_often_than_two_standard_errors_allow() -> None:
    rng = np.random.default_rng(0)
    runs = [outcome(from_scores("gold", range(6), rng.normal(size=(6, 100))), {}, None) for _ in range(40)]
    # The peak is the largest of six smoothed values, so somewhat more often than 2.3 %.
    assert sum(run["rose"] for run in runs) <= 8 and sum(run["fell"] for run in runs) <= 8


def test_agreement_of_a_reward_model_by_hand() -> None:
    scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    golds = np.array([[0.5, 0.0], [0.0, 0.5], [0.2, 0.2], [0.0, 0.1]])
    found = agreement(scores, golds, np.array([True, True, True, False]))
    assert found == {"with_gold": 2 / 3, "gold_pairs": 3, "with_annotators": 0.75, "pairs": 4}
    assert agreement(np.empty((0, 2)), np.empty((0, 2)), np.empty(0, bool))["with_gold"] is None


def evaluated(root: Path, version: int, rows: list[world.PromptRow]) -> None:
    """Leave the evaluation of one version on these prompts."""
    samples = tuple({"prompt": row["prompt"], "completion": ""} for row in rows)
    uids = tuple(row["prompt"] for row in rows)
    scores = {"gold": np.zeros(len(rows), np.float32)}
    write_evaluations(
        root, [Evaluation(version=version, task="helpdesk", prompt_uids=uids, scores=scores, samples=samples)]
    )


def test_gold_is_measured_on_prompts_on_which_nothing_was_chosen(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path).create()
    rows = world.prompts("heldout", world.size("heldout"), 5)
    evaluated(rundir.evaluations, 0, rows[:128])
    evaluated(rundir.evaluations, 4, rows[:128])
    assert sorted(row["prompt"] for row in untouched(rundir)) == sorted(row["prompt"] for row in rows[128:])
    evaluated(tmp_path / "final" / "version-000004" / "again", 4, rows[128:184])
    evaluated(tmp_path / "final" / "version-000004" / "untouched", 4, rows[184:])
    assert sorted(row["prompt"] for row in untouched(rundir)) == sorted(row["prompt"] for row in rows[184:])
    evaluated(rundir.evaluations, 8, rows)
    with pytest.raises(ValueError, match="none is left"):
        untouched(rundir)


def test_gold_of_a_version_is_the_mean_over_its_answers() -> None:
    first, second = world.prompts("heldout", 2, 0)
    answers = {4: [(first, [" ".join(world.STEPS[first["topic"]]), ""]), (second, ["Nonsense.", ""])]}
    assert golds_of(answers) == pytest.approx(np.array([[0.5, -0.05]]))


def test_a_branch_goes_on_from_a_checkpoint_with_another_kl_coefficient(tmp_path: Path) -> None:
    run, start = tmp_path / "run", tiny_policy(tmp_path / "start", tied=False)
    config = recipe(start, learner={"zero": 0}, algorithm={"kl": {"coefficient": 0.02}})
    learner = Learner(config)
    states = {}
    for version in (4, 8, 12):
        learner.step(random_batch(seed=version))
        states[version] = learner.state_dict_for_publish()
        meta = {"version": version, "position": 8 * version}
        save(run / "checkpoints", version, lambda path: learner.save(path / "policy"), meta)
    for name in ("metrics.jsonl", "metrics.sent", "mlflow_run_id", "uid", "config.yaml", "ledger.jsonl"):
        (run / name).write_text(f"{name}\n")

    branch(run, tmp_path / "copy", 8, 4)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "config.yaml", "ledger.jsonl"}  # another run in MLflow
    assert (checkpoints(tmp_path / "copy"), checkpoints(run)) == ([8], [4, 8, 12])
    found = find_latest(tmp_path / "copy" / "checkpoints")
    assert found is not None and found[1] == {"version": 8, "position": 64}
    again = Learner(config)
    again.load(found[0] / "policy")
    assert (learner.kl.value, again.kl.value) == (0.02, 0.08)
    for name, tensor in again.state_dict_for_publish().items():
        assert torch.equal(tensor, states[8][name]) and not torch.equal(tensor, states[12][name])

    as_hf(run / "checkpoints" / "step-000012", start, tmp_path / "hf")
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, states[12][name])


def test_arms_go_on_from_the_first_checkpoint_after_the_alarm_was_told() -> None:
    assert [after(version, [4, 8, 12, 16]) for version in (3, 4, 5, 12, 13, 16)] == [4, 4, 8, 12, None, None]


def test_an_attempt_never_uses_the_directory_of_an_earlier_one(tmp_path: Path) -> None:
    for expected in ((tmp_path / "a", 1), (tmp_path / "a.2", 2), (tmp_path / "a.3", 3)):
        assert fresh(tmp_path / "a") == expected
        expected[0].mkdir()


def recorded(cell: str, seed: int, state: str | None = "parted", fell: bool = True, **fields: Any) -> dict[str, Any]:
    """Return a line of results as a run leaves it; gold peaks at version 16, the alarm is at 28."""
    mean = [0.2, 0.4, 0.0 if fell else 0.4]
    said = {"version": 28, "trained": 30, "state": state, "since": 16}
    return {
        "job": f"{cell}/{seed}", "cell": cell, "seed": seed, "parent": None, "status": "done", "kind": "world is there",
        "commit": "0123456789", "changed": False, "attempt": 1, "total_s": 120.0, "branch_version": 32,
        "told": [said] if state else [], "alarm": said if state else None,
        "findings": {"chosen_version": 16, "chosen_value": {"value": 0.41 + seed % 2 / 50, "low": 0.3, "high": 0.5}},
        "truth": {
            "versions": [0, 16, 48], "mean": mean, "se": [0.02] * 3, "smoothed": mean, "peak_version": 16,
            "rose": True, "fell": fell, "at_alarm": {"value": -0.1 if fell else 0.0, "se": 0.02} if state else None,
            "gain": 0.2, "kept": {"chosen": 0.9 + seed % 10 / 100, "last": -1.0},
        },
        "evaluations": {"helpdesk/reward": {"mean": [-1.0, 0.0, 1.2]}},
        "kl": {"mean": [0.0, 0.3]},
        "reward_model": {"first": {"with_gold": 0.7}, "last": {"with_gold": 0.5}},
        "world": {"reward_accuracy": 0.69},
    } | fields  # fmt: skip


def test_the_page_counts_failures_and_shows_cells_without_a_fall(tmp_path: Path) -> None:
    rows = [recorded("demo", seed) for seed in SEEDS[:17]]
    rows += [recorded("demo", SEEDS[17], state=None), recorded("demo", SEEDS[18], fell=False)]
    failed = {"job": "demo/1020", "cell": "demo", "seed": 1020, "status": "failed", "error": "a | b; see /a/log"}
    rows += [{**failed, "parent": None, "kind": "world is there", "total_s": 9.0}]
    rows += [recorded("worlds", seed) for seed in SEEDS[:6]]
    rows += [recorded("beta-0.3-bias-0", seed, state=None, fell=False) for seed in SEEDS[:5]]
    results = Results(tmp_path / "results.jsonl")
    for row in rows:
        results.append(row)
    page = demo_report.page(results.rows, len(results.rows), "seeds.png")
    lines = page.splitlines()
    assert "| demo | 20 of 20 | 1 | 18 of 20 [0.70, 0.97] | 17 of 20 [0.64, 0.95] | 12.00 [12.00, 12.00] |" in page
    assert "| 1020 | - | - | - | - | - | - | - | - | failed: a / b |" in lines
    assert "* demo/1020 failed: a | b" in lines and "/a/log" not in page
    flat = next(line for line in lines if line.startswith("| beta-0.3-bias-0:"))
    assert "| 5 of 5 | 0 | 0 of 5 [0.00, 0.43] | 0 of 5 [0.00, 0.43] | 0 | 0 | 0 |" in flat
    not_run = next(line for line in lines if line.startswith("| gold:"))
    assert "| 0 of 5 | 0 | none | none | 0 | 0 | 0 | - | none | - |" in not_run
    centre = next(line for line in lines if line.startswith("| beta-0.02-bias-0.08:"))
    assert "| 5 of 5 |" in centre  # the first five of `worlds`
    demo = next(line for line in lines if line.startswith("| demo: "))
    assert "| 19 of 20 | 1 | 18 of 19 [0.75, 0.99] | 18 of 19 [0.75, 0.99] | 18 | 1 | 1 |" in demo
    for table in page.split("\n\n"):
        columns = {line.replace("a | b", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(columns) <= 1, table
    demo = next(line for line in lines if line.startswith("| demo | 19 |"))
    assert demo.endswith("| +0.021 [+0.016, +0.025] |")  # 10 odd seeds say 0.03 too much, 9 even ones 0.01
    assert "Trial seeds" not in page and "Trial seeds" in demo_report.page([recorded("demo", 1)], 1, "x.png")


def test_actions_are_compared_with_the_paired_continuation() -> None:
    found: dict[str, list[dict[str, Any]]] = {"demo": [recorded("demo", seed) for seed in (1, 2, 3)]}
    ends = {"action-continue": (0.0, 0.1, 0.2), "action-raise-4": (0.3, 0.4, 0.5), "action-raise-16": (0.3, 0.3, 0.2)}
    for arm, of_arm in ends.items():
        found[arm] = []
        for seed, end in zip((1, 2, 3), of_arm, strict=True):
            truth = recorded(arm, seed)["truth"] | {"versions": [0, 32, 48], "mean": [0.2, 0.3, end]}
            found[arm].append(recorded(arm, seed, truth=truth))
    found["action-raise-16"][2] |= {"status": "skipped", "error": "its parent raised no alarm"}
    lines = demo_report.actions(found)
    assert "| action-raise-4: KL coefficient times 4 | 3 | +0.300 [+0.300, +0.300] |" in lines
    assert "| stop | 3 | +0.200 [-0.048, +0.448] |" in lines  # 0.3, 0.2, 0.1: 0.1 / √3 times t(0.975, 2) = 4.303
    assert "| the run itself, not branched | 3 | -0.100 [-0.348, +0.148] |" in lines
    assert "| action-raise-16: KL coefficient times 16 | 2 | +0.250 [-0.385, +0.885] |" in lines
    assert "* skipped: its parent raised no alarm: 1" in lines


def test_the_figure_is_drawn_whatever_has_run(tmp_path: Path) -> None:
    some = [recorded(job.cell, job.seed, fell=job.seed % 2 == 0) for job in jobs() if job.parent is None]
    for name, rows in (("none.png", []), ("some.png", some[:45]), ("all.png", some)):
        demo_report.draw(tmp_path / name, demo_report.by_cell(rows))
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    json.dumps(some[0])
