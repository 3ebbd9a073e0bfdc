"""The tracker against a real MLflow store and a real server that comes up late."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest

from configs.schema import Recipe
from trainers.ledger import Entry, Ledger
from trainers.redact import masked, printable_uri, short
from trainers.rundir import RunDir
from trainers.tracking import NodeMonitor, Tracker, history
from trainers.types import Evaluation


def recipe(uri: str, **model: str) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "r"},
            "model": {"path": "some/model"},
            "data": {"path": "some/data"},
            "sampling": {"max_tokens": 48},
            "generator": {"engine": {"hf_token": "hf_verysecret", "note": "x" * 9000}},
            "tracking": {"uri": uri, "experiment": "e", "system_metrics": False},
        }
    )


def evaluation(version: int) -> Evaluation:
    return Evaluation(
        version=version, task="gold", prompt_uids=("e0-p1", "e0-p2"),
        scores={"score": np.array([1.0, 3.0], np.float32)},
        samples=({"prompt": "p", "completion": "c", "score": np.float32(1.0)},),
    )  # fmt: skip


def step(version: int) -> Entry:
    return Entry(
        step=version, version=version, prompts=(f"p{version}",), rollouts=(), loss=0.0, grad_norm=0.0,
        weights_hash="", rng_hash="", incarnation=0,
    )  # fmt: skip


def test_everything_arrives_once_and_a_resume_continues_the_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.MlflowClient(uri).create_experiment("e", artifact_location=(tmp_path / "mlruns").as_uri())
    rundir = RunDir(tmp_path / "run").create()
    for incarnation in range(2):
        with Tracker(recipe(uri), rundir, incarnation=incarnation) as tracker:
            tracker.log_dataset(
                "train", digest="d" * 64, source="public/data", context="training", split="train", rows=3
            )
            begin = 1 if incarnation == 0 else 2
            for version in range(begin, 4):
                tracker.log_metrics(version, {"reward/mean": version + 10.0 * incarnation, "odd@key//x": float("nan")})
                if incarnation == 1 or version == 1:
                    Ledger(rundir.ledger).append(step(version))
            tracker.log_samples(1, [{"prompt": "p", "completion": "c", "reward": float("nan")}])
            tracker.log_evaluations([evaluation(1)])
            if incarnation == 0:
                tracker.log_evaluations([evaluation(3)])  # rolled back by the resume
            checkpoint = rundir.checkpoints / "step-000001"
            checkpoint.mkdir(exist_ok=True)
            tracker.log_checkpoint(checkpoint, 1)
        run_id = tracker.run_id
    assert run_id is not None
    client = mlflow.MlflowClient(uri)
    assert len(client.search_runs(client.get_run(run_id).info.experiment_id)) == 1
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run_id, "reward/mean")) == 5  # 1, 2, 3 and again 2, 3: each once
    assert history(uri, run_id, "reward/mean") == [(1, 1.0), (2, 12.0), (3, 13.0)]
    assert history(uri, run_id, "eval/gold/score") == [(1, 2.0)]
    assert "odd_key/x" in run.data.metrics
    assert run.data.params["generator.engine.hf_token"] == "***" and run.data.params["sampling.max_tokens"] == "48"
    assert len(run.data.params["generator.engine.note"]) == 500
    assert {
        "config.model",
        "config.reward",
        "config.algorithm",
        "config.evaluation",
        "config.data",
    } <= run.data.tags.keys()
    assert [found.dataset.digest for found in run.inputs.dataset_inputs] == ["d" * 36]
    assert {a.path for a in client.list_artifacts(run_id)} >= {"config", "evaluations", "samples"}
    table = mlflow.load_table("samples/version-000001.json", run_ids=[run_id])
    assert table["completion"].tolist() == ["c"]
    models = client.search_logged_models([run.info.experiment_id])
    assert [(m.name, m.tags["path"]) for m in models] == [("step-000001", str(checkpoint.resolve()))]
    with Tracker(recipe(uri), rundir, incarnation=2) as again:
        [result] = again.evaluations(up_to=3)[1]
        assert again.evaluations(up_to=3).keys() == {1}
    assert result.prompt_uids == ("e0-p1", "e0-p2") and result.scores["score"].tolist() == [1.0, 3.0]


@pytest.mark.slow
def test_a_server_that_comes_up_late_gets_every_metric_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    rundir = RunDir(tmp_path / "run").create()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(recipe(uri), rundir, incarnation=0)
        for version in range(1, 21):
            tracker.log_metrics(version, {"reward/mean": float(version)})
            Ledger(rundir.ledger).append(step(version))
        time.sleep(1.5)
        assert tracker.run_id is None
        tracker.finish(deadline_s=1)
    assert time.monotonic() - began < 10
    assert sum("is not reachable" in line for line in caplog.messages) == 1
    assert sum("are not at" in line for line in caplog.messages) == 1

    command = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "served"),
    ]  # fmt: skip
    resumed = Tracker(recipe(uri), rundir, incarnation=1)
    with (tmp_path / "server.log").open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path, start_new_session=True)
    try:
        resumed.log_metrics(21, {"reward/mean": 21.0})
        deadline = time.monotonic() + 90
        while resumed.run_id is None and time.monotonic() < deadline:
            time.sleep(0.5)
        resumed.finish(deadline_s=60)
        assert resumed.run_id is not None, (tmp_path / "server.log").read_text()
        client = mlflow.MlflowClient(uri)
        points = client.get_metric_history(resumed.run_id, "reward/mean")
        assert sorted((m.step, m.value) for m in points) == [(v, float(v)) for v in range(1, 22)]
        assert client.get_run(resumed.run_id).info.status == "FINISHED"
        assert [a.path for a in client.list_artifacts(resumed.run_id)] == ["config"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers too
        server.wait(20)


def test_secrets_are_masked_and_token_counts_are_not() -> None:
    tree = {
        "a": {"max_tokens": 4, "api_key": 12, "token": "t"},
        "uri": "http://me:pw@h/x?sig=abc&n=1",
        "l": [{"password": "p"}],
    }
    assert masked(tree) == {
        "a": {"max_tokens": 4, "api_key": "***", "token": "***"},
        "uri": "http://***@h/x?sig=***&n=1",
        "l": [{"password": "***"}],
    }
    assert printable_uri("sqlite:///mlflow.db") == "sqlite:///mlflow.db"
    assert short("a" * 10) == "a" * 10 and short("a" * 600) != short("a" * 601) and len(short("a" * 600)) == 500


def test_a_node_is_sampled() -> None:
    assert 0 <= NodeMonitor().sample()["system_memory_usage_percentage"] <= 100
