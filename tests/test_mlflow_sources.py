"""`headroom watch`, `report`, `compare` on runs in MLflow: Headroom's own, and those logged as TRL's trainer does."""

import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities import Metric, Param

from cluster.__main__ import main
from configs.schema import Recipe
from tests.test_report import Parsed
from tests.test_watch import GOLD, answers, refused, scores
from trainers.ledger import Entry, Ledger
from trainers.measured import Columns
from trainers.records import write_evaluations
from trainers.rundir import RunDir
from trainers.sources import read, read_all
from trainers.tracking import Tracker
from trainers.types import Evaluation

STORE = "sqlite:///mlflow.db"
TRL_EVAL = "eval_rewards/gold/mean"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with a run of Headroom, in `run` and in MLflow, and runs as TRL's trainer logs them."""
    root = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{root}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    for name in ("headroom", "trl", "empty"):
        client.create_experiment(name, artifact_location=(root / name).as_uri())
    before = mlflow.get_tracking_uri()
    headroom_run(root / "run", uri)
    mlflow.set_tracking_uri(before)
    [experiment] = client.search_experiments(filter_string="name = 'trl'")
    for name in ("grpo", "again", "again"):
        run_id = client.create_run(experiment.experiment_id, run_name=name).info.run_id
        points = [Metric(key, value, 1000 + step, step) for step in range(100) for key, value in trl(step).items()]
        client.log_batch(run_id, points, [Param("learning_rate", "1e-06")])
        client.set_terminated(run_id)
    return root


def trl(step: int) -> dict[str, float]:
    """What transformers' MLflow callback sends at a step of GRPOTrainer with a second, unweighted reward function.

    The names were compared with a store that TRL 1.16 wrote with `eval_on_start`; it has more of them. A standard error
    is there only if a reward function logs one (docs/watch.md).
    """
    metrics: dict[str, float] = {}
    if step:
        metrics = {"reward": step / 100, "reward_std": 0.3, "kl": step / 500, "entropy": 2.0}
        metrics |= {"reward_se": 0.02, "rewards/gold/mean": step / 100, "rewards/gold/mean_se": 0.05}
        metrics |= {"completions/mean_length": 20.0, "completions/clipped_ratio": 0.1}
    if step % 10 == 0:
        metrics |= {"eval_reward": step / 100, TRL_EVAL: GOLD[step // 10], "eval_rewards/gold/std": 0.5}
        metrics |= {f"{TRL_EVAL}_se": 0.05, "eval_reward_se": 0.02, "eval_loss": 0.0, "eval_entropy": 2.0}
    return metrics


def headroom_run(path: Path, uri: str) -> None:
    """Write a run directory as a training does: killed after version 60, resumed from 50 on."""
    recipe = Recipe.model_validate(
        {
            "run": {"name": "mine", "steps": 90},
            "model": {"path": "some/model"},
            "data": {"path": "some/data"},
            "sampling": {"max_tokens": 48},
            "evaluation": {"every": 10, "primary": "task/gold"},
            "tracking": {"uri": uri, "experiment": "headroom", "system_metrics": False},
        }
    )
    rundir = RunDir(path).create()
    for incarnation, versions in enumerate((range(0, 61), range(51, 91))):
        if incarnation:
            Ledger(rundir.ledger).roll_back(50)
        with Tracker(recipe, rundir, incarnation=incarnation) as tracker:
            for version in versions:
                if version:
                    Ledger(rundir.ledger).append(step_of(version, incarnation))
                tracker.log_metrics(version, {"reward/mean": version / 100 - incarnation, "time/step": 1.0})
                tracker.log_metrics(version, {"reward/mean_se": 0.02, "reward/tail": 1.75})
                tracker.log_metrics(version, {"kl/reference": version / 500, "policy/entropy": float("nan")})
                if version % 10 == 0:
                    tracker.log_evaluations([evaluation(version, shift=5.0 * (incarnation == 0 and version > 50))])
            if incarnation:
                keep_final(rundir, tracker)
            tracker.finish(deadline_s=120)


def keep_final(rundir: RunDir, tracker: Tracker) -> None:
    """Write what a training leaves when it has ended at version 90."""
    for part, versions in {"again": (0, 40, 50), "untouched": (0, 50)}.items():
        for version in versions:
            uids = tuple(f"{part}-p{place}" for place in range(200))
            again = replace(evaluation(version, shift=0.0), prompt_uids=uids)
            write_evaluations(rundir.final / "version-000090" / part, [again])
    tracker.log_final(rundir.final / "version-000090")


def step_of(version: int, incarnation: int) -> Entry:
    return Entry(
        step=version, version=version, prompts=(f"p{version}",), rollouts=(), loss=0.0, grad_norm=0.0,
        weights_hash="", rng_hash="", incarnation=incarnation,
    )  # fmt: skip


def evaluation(version: int, shift: float) -> Evaluation:
    gold = scores()[version // 10] + shift
    length = np.full(200, 10.0 + version)
    return Evaluation(
        version=version,
        task="task",
        prompt_uids=tuple(f"e0-p{i}" for i in range(200)),
        scores={"length": length.astype(np.float32), "gold": gold.astype(np.float32)},
        samples=({"uid": "e0-p0-s0", "prompt": "p", "completion": f"answer {version}", "gold": float(gold[0])},),
    )


@pytest.mark.slow
def test_a_run_of_headroom_says_the_same_from_its_directory_and_from_mlflow(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store)
    found = answers(["run"], capsys)
    assert found["state"] == "broken" and found["evaluation"] == "task/gold"
    assert found["evaluated_versions"] == list(range(0, 91, 10)) and found["reward"] == "reward/mean"
    run_id = (store / "run" / "mlflow_run_id").read_text().strip()
    assert answers([f"mlflow:{run_id}"], capsys) == found
    assert answers(["mine", "--tracking-uri", STORE], capsys) == found
    here, there = read("run"), read(f"mlflow:{run_id}")
    np.testing.assert_allclose(here.series.primary.mean, scores().mean(1), atol=1e-6)
    assert here.series.reward.mean[50] == pytest.approx(0.50) and here.series.reward.mean[51] == pytest.approx(-0.49)
    assert found["chosen_value"]["sample"] == "untouched" and found["chosen_version"] in (0, 40, 50)
    for run in (here, there):
        assert run.final is not None and run.final.again.versions.tolist() == [0, 40, 50]
        assert run.final.untouched.versions.tolist() == [0, 50]
        assert run.series.reward.se is not None and run.series.reward.se == pytest.approx([0.02] * 91)
        assert (run.planned, run.final_version) == (10, 90) and run.name == "mine" and run.seconds == 91
        assert [early.curve.name for early in run.early_warnings] == ["policy/entropy", "reward/tail", "task/length"]
        assert run.samples[60][0]["completion"] == "answer 60" and run.params["run.steps"] == "90"
    assert here.evaluation_hash == there.evaluation_hash is not None
    assert here.params == there.params


@pytest.mark.slow
def test_a_run_of_trl_is_judged(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store)
    found = answers(["mlflow:grpo", "--eval", TRL_EVAL], capsys)
    assert (found["state"], found["evaluation"], found["reward"]) == ("parted", TRL_EVAL, "reward")
    run = read("mlflow:grpo", Columns(evaluations=(TRL_EVAL,)))
    assert run.series.kl is not None and run.series.reward.versions.tolist() == list(range(1, 100))
    assert run.series.reward.se is not None and run.length is None
    assert [curve.name for curve in read("mlflow:grpo").series.evaluations] == [TRL_EVAL]
    assert run.params == {"learning_rate": "1e-06"} and run.seconds is not None
    early = {one.curve.name for one in run.early_warnings}
    assert early == {"reward_std", "entropy", "completions/mean_length", "completions/clipped_ratio"}
    assert [one.name for one in read_all("mlflow:trl")] == ["again", "again", "grpo"]
    refused(["watch", "mlflow:again", "--once"], ["2 runs are called again", "by its id"], capsys)
    refused(["watch", "mlflow:none", "--once"], ["no run or experiment none", "headroom", "trl"], capsys)
    refused(["watch", "mlflow:empty", "--once"], ["experiment empty", "no runs"], capsys)
    refused(["watch", "mlflow:grpo", "--eval", "golb", "--once"], ["--eval", "golb", TRL_EVAL], capsys)
    refused(
        ["watch", "mlflow:grpo", "--once", "--tracking-uri", "sqlite:///no.db"], ["no MLflow store", "no.db"], capsys
    )
    assert not (store / "no.db").exists()


@pytest.mark.slow
def test_reports_and_comparisons_of_runs_in_mlflow(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store)
    assert main(["report", "mlflow:mine"]) == 0
    assert "Broken since version" in capsys.readouterr().out
    shown = Parsed(Path("report-mine/report.html").read_text(encoding="utf-8"))
    for words in ("answer 0", "answer 90", "policy/entropy", "run.steps", "200", "task/gold"):
        assert words in shown.text, words
    assert main(["report", "mlflow:grpo", "--eval", TRL_EVAL, "--text"]) == 0
    assert "Parted since version" in capsys.readouterr().out and not Path("report-grpo").exists()
    assert main(["compare", "--experiment", "trl", "--eval", TRL_EVAL]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("again #1", "again #2", "grpo", "3 parted"))
    assert main(["compare", "run", "mlflow:mine", "--output", "both"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("mine #1", "mine #2", "2 broken")) and "WARNING" not in printed
    assert "2 runs, 1 recipe" in Parsed(Path("both/comparison.html").read_text(encoding="utf-8")).text
    assert main(["budget", "mlflow:mine", "--detect", "0.2", "--planned", "10"]) == 0
    assert "10 evaluations of" in capsys.readouterr().out


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE notes (text)")
    database.close()


def older(path: Path) -> None:
    """Make a store as an older version of MLflow leaves it; a newer one would change it while it opens it."""
    shutil.copy("mlflow.db", path)
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE webhooks")
        database.execute("UPDATE alembic_version SET version_num = 'older'")
    database.close()


STORES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no database": (lambda path: path.write_text("notes\n" * 1000), "file is not a database"),
    "empty": (lambda path: path.touch(), "holds no experiments"),
    "a directory": (lambda path: path.mkdir(), "Is a directory"),
    "another program's": (foreign, "holds no experiments"),
    "cut off": (lambda path: path.write_bytes(Path("mlflow.db").read_bytes()[:100_000]), "malformed"),
    "another version's": (older, "mlflow db upgrade"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORES)
def test_a_broken_database_is_one_line_and_stays_as_it_is(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store)
    make, says = STORES[name]
    path = tmp_path / "some.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    argv = ["watch", "mlflow:grpo", "--eval", TRL_EVAL, "--once", "--tracking-uri", f"sqlite:///{path}"]
    refused(argv, ["some.db", says], capsys)
    assert before is None or path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


ARTIFACTS: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "all missing": (lambda root: shutil.rmtree(root), 2, ["records of all evaluated versions (0, 10, 20", "missing"]),
    "a file for a directory": (lambda root: (shutil.rmtree(root), root.touch()), 2, ["records of all", "missing"]),
    "samples deleted": (
        lambda root: (root / "version-000050/task.samples.jsonl").unlink(),
        2,
        ["evaluations/version-000050/task.json: damaged record", "task.samples.jsonl: No such file"],
    ),
    "half a record": (
        lambda root: (root / "version-000050/task.json").write_text('{"version": 50, "task"'),
        2,
        ["evaluations/version-000050/task.json: damaged record"],
    ),
    "other JSON": (
        lambda root: (root / "version-000050/task.json").write_text("[50]"), 2, ["version-000050/task.json: damaged"]
    ),
    "too few scores": (
        lambda root: (root / "version-000050/task.json").write_text(
            '{"version": 50, "task": "task", "prompt_uids": ["a", "b"], "scores": {"gold": [1.0]}}'
        ),
        2,
        ["version-000050/task.json: damaged", "1 scores of gold for 2 prompts"],
    ),
    "a link to nowhere": (lambda root: (root / "version-000050/more").symlink_to("/nowhere"), 1, ["MLflow at sqlite"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTIFACTS)
def test_broken_artifacts_are_one_line(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store)
    damage, code, says = ARTIFACTS[name]
    [root] = store.glob("headroom/*/artifacts/evaluations")
    shutil.copytree(root, tmp_path / "kept")
    try:
        damage(root)
        refused(["watch", "mlflow:mine", "--once", "--json"], says, capsys, code)
    finally:
        root.unlink() if root.is_file() else shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", root)


@pytest.mark.slow
def test_a_version_whose_record_was_deleted_is_left_out_and_noted(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store / "run", "run")
    shutil.rmtree(Path("run/evaluations/version-000050"))
    found = answers(["run"], capsys)
    assert 50 not in found["evaluated_versions"] and 60 in found["evaluated_versions"]
    assert "version 50 left out: it was evaluated, its record is missing" in found["reasons"]


@pytest.mark.slow
def test_an_old_store_of_files_is_read_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # to make one
    client = mlflow.MlflowClient("mlruns")
    run_id = client.create_run(client.create_experiment("old"), run_name="grpo").info.run_id
    points = [Metric(key, value, 1000 + step, step) for step in range(0, 100, 10) for key, value in trl(step).items()]
    client.log_batch(run_id, points)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    before = {path: path.stat().st_mtime_ns for path in Path("mlruns").rglob("*")}
    found = answers(["mlflow:grpo", "--eval", TRL_EVAL, "--tracking-uri", "mlruns"], capsys)
    assert found["evaluated_versions"] == list(range(0, 100, 10))
    assert {path: path.stat().st_mtime_ns for path in Path("mlruns").rglob("*")} == before
    Path("notes").mkdir()
    refused(["watch", "mlflow:grpo", "--once", "--tracking-uri", "notes"], ["notes", "holds no experiments"], capsys)
    assert list(Path("notes").iterdir()) == []
    Path("some.db").touch()
    refused(["watch", "mlflow:grpo", "--once", "--tracking-uri", "some.db"], ["sqlite:///some.db"], capsys)
