"""What a supervised training tells MLflow, also when it was stopped, or when the server was away."""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import mlflow
import pytest

from configs.schema import Recipe
from tests.ranks import tiny_policy
from tests.test_offline import Stop, offline, preferences
from trainers.offline import Note, train_reward
from trainers.rundir import RunDir
from trainers.tracking import history
from trainers.training_tracker import TrainingTracker


@pytest.fixture
def uri(tmp_path: Path) -> str:
    found = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.MlflowClient(found).create_experiment("e-offline", artifact_location=(tmp_path / "mlruns").as_uri())
    return found


def recipe(uri: str, path: str) -> Recipe:
    tracking = {"uri": uri, "experiment": "e", "tags": {"team": "a"}}
    return Recipe.model_validate(
        {"run": {"name": "r"}, "model": {"path": path}, "data": {"path": "none"}, "tracking": tracking}
    )


def test_a_training_that_was_stopped_is_one_run_with_each_step_once(tmp_path: Path, uri: str) -> None:
    path = tiny_policy(tmp_path / "tiny")
    config = offline(tmp_path / "out", epochs=3, batch=4, checkpoint_every=3)
    tracker = partial(TrainingTracker, recipe(uri, path), "reward model proxy", config, "d" * 64, flush_s=120)
    calls: list[int] = []

    def stopping(directory: RunDir, step: int) -> AbstractContextManager[Note]:
        class Stopping(TrainingTracker):
            def __call__(self, step: int, metrics: dict[str, float]) -> None:
                super().__call__(step, metrics)
                if "train/loss" in metrics:
                    calls.append(step)
                    if step == 5:
                        raise Stop

        return Stopping(recipe(uri, path), "reward model proxy", config, "d" * 64, directory, step)

    with pytest.raises(Stop):
        train_reward(config, path, preferences(24), track=stopping)
    result = train_reward(config, path, preferences(24), track=tracker)
    assert calls == [1, 2, 3, 4, 5] and sorted(p.name for p in tmp_path.glob("out*")) == ["out"]

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("e-offline")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("r reward model proxy", "FINISHED")
    steps = [step for step, _ in history(uri, run.info.run_id, "train/loss")]
    assert steps == list(range(1, result.steps + 1))
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == result.steps + 2  # 4 and 5, rolled back
    held_out = dict(history(uri, run.info.run_id, "holdout/loss"))
    assert held_out == {0: pytest.approx(result.loss_before), result.steps: pytest.approx(result.loss)}
    assert history(uri, run.info.run_id, "holdout/accuracy") == [(result.steps, pytest.approx(result.accuracy))]
    assert (run.data.params["epochs"], run.data.params["base"]) == ("3", path)
    assert run.data.tags["headroom.output"] == config.output and run.data.tags["team"] == "a"
    assert [found.dataset.digest for found in run.inputs.dataset_inputs] == ["d" * 36]


def test_what_the_server_did_not_take_is_sent_when_the_command_is_repeated(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_policy(tmp_path / "tiny")
    config = offline(tmp_path / "out", batch=4)
    nobody = "http://127.0.0.1:9"
    train = partial(train_reward, config, path, preferences(24))
    away = partial(TrainingTracker, recipe(nobody, path), "reward model a", config, "d", flush_s=0.1)
    result = train(track=away)
    assert "are sent when the command is repeated" in caplog.text
    kept = tmp_path / "out.checkpoint"
    assert (kept / "metrics.jsonl").exists() and not (kept / "checkpoints").exists() and not list(kept.glob("*.npy"))
    lines: list[str] = []
    there = partial(TrainingTracker, recipe(uri, path), "reward model a", config, "d", flush_s=120)
    again = train(log=lines.append, track=there)
    assert again == result and "trained already" in lines[0] and not kept.exists()
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("e-offline")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert [step for step, _ in history(uri, run.info.run_id, "train/loss")] == list(range(1, result.steps + 1))
    assert run.info.status == "FINISHED"
