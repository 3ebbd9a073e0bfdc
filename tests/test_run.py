"""A whole run on real Ray, vLLM, DeepSpeed and MLflow: killed, asked to end, and continued on two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_model
from trainers.checkpoint import find_latest
from trainers.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[1]
STEPS = 16
WAIT_S = 400


def recipe(where: Path) -> Path:
    """Write a recipe with a tiny policy, a critic, a rule as reward and one evaluation."""
    tiny_model(where / "policy", tied=True, seed=0)
    words = "red blue green one two three four five six seven".split()
    rows = [{"prompt": f"{a} and {b}"} for a in words for b in words]
    (where / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"cpus": 0.3}
    tree: dict[str, Any] = {
        "run": {"name": "test", "dir": str(where / "run"), "steps": STEPS, "checkpoint_every": 2},
        "model": {"path": str(where / "policy"), "dtype": "float32", "max_length": 96},
        "data": {"path": str(where / "prompts.jsonl"), "render": "text"},
        "sampling": {"n": 4, "max_tokens": 12},
        "algorithm": {"name": "ppo"},
        "loop": {"batch_prompts": 4, "staleness": 1},
        "learner": {"resources": small, "optimizer": {"learning_rate": 1e-3}},
        "critic": {"resources": small},
        "reference": {"resources": small},
        "reward": {"components": [{"name": "length", "function": "actors.rules:length"}], "resources": small},
        "generator": {"kv_cache_gb": 0.25, "resources": small},
        "evaluation": {
            "every": 2,
            "primary": "held/length",
            "kv_cache_gb": 0.25,
            "resources": small,
            "tasks": [
                {
                    "name": "held",
                    "data": {"path": str(where / "prompts.jsonl"), "render": "text"},
                    "prompts": 16,
                    "sampling": {"n": 1, "max_tokens": 12},
                    "scorers": [{"name": "length", "function": "actors.rules:length"}],
                }
            ],
        },
        "tracking": {"uri": f"sqlite:///{where}/mlflow.db"},
    }
    path = where / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def launch(config: Path, *overrides: str) -> subprocess.Popen[str]:
    log = open(config.with_suffix(".log"), "a")
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", "train", str(config), *overrides],
        cwd=ROOT,
        stderr=log,
        stdout=log,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], config: Path) -> None:
    code = process.wait(WAIT_S)
    assert code == 0, config.with_suffix(".log").read_text()[-3000:]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], config: Path) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, config.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < end, "waited too long: " + config.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.002)


def kill(process: subprocess.Popen[str]) -> None:
    """End the driver, and only it, the hard way."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def kill_generator() -> None:
    """Kill the actor of the generator, and see vLLM's processes, which are its children, end by themselves."""
    below = {process.pid for process in psutil.Process().children(recursive=True)}
    titles = {process: "".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}
    [actor] = [p for p, title in titles.items() if p.pid in below and title.startswith("ray::Generator")]
    engine = actor.children(recursive=True)
    assert any("EngineCore" in "".join(process.cmdline()) for process in engine), engine
    actor.kill()
    wait_until_gone(engine)


def wait_until_gone(processes: list[psutil.Process], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while left := [process for process in processes if alive(process)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Start a cluster whose nodes are each too small for all actors."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def test_killed_three_times_asked_to_end_and_resumed_on_two_nodes_exactly_once(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    run = tmp_path / "run"
    first = launch(config)
    wait_for(lambda: (run / "config.yaml").exists(), first, config)
    second = subprocess.run(
        [sys.executable, "-m", "cluster", "train", str(config)], cwd=ROOT, capture_output=True, text=True
    )
    assert second.returncode == 2 and "another launch" in second.stderr, second.stderr
    wait_for(lambda: (run / "ledger.jsonl").exists() and len(_lines(run / "ledger.jsonl")) >= 3, first, config)
    engines = [p for p in psutil.Process(first.pid).children(recursive=True) if "VLLM" in "".join(p.cmdline())]
    assert len(engines) >= 2, engines  # an EngineCore each of generator and evaluator
    kill(first)
    wait_until_gone(engines)  # none lives on beside those of the resume

    again = launch(config)
    checkpoints = run / "checkpoints"
    known = {path.name for path in checkpoints.iterdir()}
    wait_for(
        lambda: any(p.name.startswith(".tmp-step") for p in checkpoints.iterdir() if p.name not in known), again, config
    )
    kill(again)  # in the middle of writing a checkpoint

    third = launch(config)
    wait_for(lambda: '"incarnation": 2' in (run / "ledger.jsonl").read_text(), third, config)
    third.terminate()
    finish(third, config)  # after it has saved
    saved = find_latest(checkpoints)
    assert saved is not None and saved[1]["version"] == len(_lines(run / "ledger.jsonl"))

    with two_nodes() as cluster:
        fourth = launch(config, f"ray.address={cluster.address}")
        wait_for(lambda: '"incarnation": 3' in (run / "ledger.jsonl").read_text(), fourth, config)
        kill_generator()
        finish(fourth, config)  # on its replacement: there is no other replica
    log = config.with_suffix(".log").read_text()
    assert "replacing generator-0 (1 of 2)" in log and "generator-0 serves again" in log
    ledger = Ledger(run / "ledger.jsonl")
    entries = list(ledger)
    assert [entry.step for entry in entries] == list(range(1, STEPS + 1))
    assert ledger.check() == []
    assert {entry.incarnation for entry in entries} >= {2}
    assert len(_lines(run / "ledger.rolled_back.jsonl")) >= 1

    _check_tracking(tmp_path, run)
    assert {path.name for path in (run / "final" / f"version-{STEPS:06d}").iterdir()} == {"again", "untouched"}
    best = [path for path in (run / "exports").iterdir() if path.name.startswith("version-")]
    assert best
    for path in best:  # evaluated, best or last: plain HF models
        model = AutoModelForCausalLM.from_pretrained(path)
        ids = AutoTokenizer.from_pretrained(path)("red and blue", return_tensors="pt").input_ids
        assert model(ids).logits.isfinite().all()


def _check_tracking(where: Path, run: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{where}/mlflow.db")
    client = mlflow.MlflowClient()
    run_id = (run / "mlflow_run_id").read_text().strip()
    assert client.get_run(run_id).info.status == "FINISHED"
    for key in EVERY_STEP:
        versions = {metric.step for metric in client.get_metric_history(run_id, key)}
        assert versions == set(range(1, STEPS + 1)), key
    served = {metric.step: metric.value for metric in client.get_metric_history(run_id, "generator/restarts")}
    assert served[STEPS] == 1
    busy = {metric.step: metric.value for metric in client.get_metric_history(run_id, "time/generator-0_busy")}
    assert all(busy[version] >= 0 for version in busy) and busy[STEPS - 1] > 0
    assert int(client.get_run(run_id).data.tags["chosen.version"]) in range(STEPS + 1)
    evaluated = {metric.step for metric in client.get_metric_history(run_id, "eval/held/length")}
    assert evaluated == set(range(0, STEPS + 1, 2))
    gaps = [metric.value for metric in client.get_metric_history(run_id, "sync/logprob_gap")]
    assert max(gaps) < 1e-4
    logged = client.get_run(run_id)
    for node in ("driver", "node-1"):  # the actors need both nodes, and the driver is on one of them
        assert 0 < logged.data.metrics[f"system/{node}/system_memory_usage_percentage"] < 100
    assert {tag for tag in logged.data.tags if tag.startswith("system.")} == {"system.node-1"}


EVERY_STEP = (
    "reward/mean reward/mean_se reward/std reward/length/mean kl/reference loss/policy loss/value policy/entropy "
    "policy/clip_fraction policy/grad_norm rollout/staleness_max rollout/staleness_mean rollout/length_mean "
    "rollout/truncated_fraction rollout/discarded sync/seconds sync/logprob_gap time/step "
    "throughput/samples_per_s throughput/tokens_per_s"
).split()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
