"""One real `headroom train` that goes wrong in every way it takes actors to go wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow

from trainers.engine import free_port

ROOT = Path(__file__).parents[1]
WAIT_S = 400
RULES = """
import math
import time
from pathlib import Path


def fails(prompt, completion, row):
    time.sleep(0.5)  # so that a server can keep up with the steps
    if row.get("how") == "raise":
        return row["no such column"]
    if row.get("how") == "hang":
        time.sleep(600)
    if row.get("how") == "nan" or Path(__file__).with_name("broken").exists():
        return math.nan
    return -len(completion)
"""
OVERRIDES = (
    "reward.components.0.function=rules:fails",
    "reward.deadline_s=5",
    "algorithm.kl.where=none",
    "sampling.n=2",
    "sampling.max_tokens=8",
    "loop.batch_prompts=4",
    "loop.discard_budget=0.3",
    "run.steps=100000",
    "run.checkpoint_every=100000",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command said, and what it left."""

    code: int
    said: str  # on standard error
    kept: str = ""  # why prompts were discarded, as the ledger has it
    before_server: frozenset[int] = frozenset()  # versions trained while no MLflow server was there
    arrived: frozenset[int] = frozenset()  # versions whose metrics it has


def failing_run(world: Path) -> Answer:
    """Train with a reward function that fails on some prompts, without an MLflow server; start one; fail on all.

    `world` holds recipe.yaml and policy/.
    """
    hows = {3: "raise", 7: "hang", 11: "nan"}
    rows = [{"prompt": f"question {i}", "how": hows.get(i)} for i in range(24)] + [{"prompt": "long " * 20}]
    (world / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (world / "rules.py").write_text(RULES)
    port = free_port()
    log, ledger, metrics = world / "log", world / "runs/case/ledger.jsonl", world / "runs/case/metrics.jsonl"
    run = start(
        world, log, "cluster", "train", "recipe.yaml", *OVERRIDES, f"tracking.uri=http://127.0.0.1:{port}"
    )  # fmt: skip
    server = None
    try:
        failed = [f"e0-p{number}-s" for number in hows]
        wait_for(lambda: ledger.exists() and all(uid in ledger.read_text() for uid in failed), run, log)
        wait_for(lambda: "is not reachable" in log.read_text(), run, log)
        before = frozenset(entry["version"] for entry in entries(ledger))
        size = metrics.stat().st_size
        server = start(
            world, world / "server.log", "mlflow", "server", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{world}/server.db", "--artifacts-destination", str(world / "served"),
        )  # fmt: skip
        wait_for(lambda: delivered(metrics.with_suffix(".sent")) >= size, run, log)
        (world / "broken").touch()
        code = run.wait(WAIT_S)
        client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
        run_id = (world / "runs/case/mlflow_run_id").read_text().strip()
        arrived = frozenset(point.step for point in client.get_metric_history(run_id, "reward/mean"))
    finally:
        for process in filter(None, (run, server)):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
                process.wait(20)
    kept = "\n".join(reason for entry in entries(ledger) for reason in entry["discarded"].values())
    return Answer(code=code, said=log.read_text(), kept=kept, before_server=before, arrived=arrived)


def entries(ledger: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a ledger that is being written; `Ledger` would mend the last one."""
    return [json.loads(line) for line in ledger.read_text().splitlines(keepends=True) if line.endswith("\n")]


def start(world: Path, log: Path, module: str, *argv: str) -> "subprocess.Popen[bytes]":
    """Start `python -m module` in a session of its own, with standard error in `log`."""
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            cwd=world,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
        )


def wait_for(condition: Callable[[], bool], run: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until `condition` holds; fail if the run ends before."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert run.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def delivered(progress: Path) -> int:
    """Return how many bytes of a spool have reached the server."""
    return int(json.loads(progress.read_text())["bytes"]) if progress.exists() else 0
