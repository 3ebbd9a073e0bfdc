"""Runs of the demo's world over seeds, with its controls and the study of actions: a line of results.jsonl for each.

    python -m benchmarks.demo_seeds runs/demo-seeds --until 06:30 --parallel 2
    python -m benchmarks.demo_report runs/demo-seeds/results.jsonl --output docs/results/demo_seeds.md

What has a line is not run again, so the same command goes on where it ended. A run that fails is a line too.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from benchmarks import demo_record
from benchmarks.demo_plan import RECIPE, ROOT, SEEDS, TRIAL_SEEDS, Job, jobs, overrides, recipe_of
from benchmarks.demo_queue import Queue, Results, SkippedError, deadline, hold, select, told, work
from configs.errors import UserError
from trainers.checkpoint import name_of
from trainers.world_build import MANIFEST

GRACE_S = 60.0  # for a run that was asked to end
STORE = "mlflow.db"
TRAIN = (sys.executable, "-m", "cluster", "train", str(RECIPE))
Row = dict[str, Any]


class Runner:
    """Runs one job in a process of its own, and records it."""

    def __init__(self, out: Path, results: Results, timeout_s: float, command: Sequence[str] = TRAIN) -> None:
        self._out = out
        self._results = results
        self._timeout_s = timeout_s
        self._command = command  # the overrides come after it
        self._commit = commit()
        self._stopping = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._recording = threading.Lock()  # torch has one random state a process

    def kind(self, job: Job) -> str:
        """Tell runs apart that take differently long: some build their world first."""
        if job.parent:
            return "arm"
        if (self._out / "worlds" / job.world / MANIFEST).exists():
            return "world is there"
        options = job.world.partition("-")[2]
        return f"builds world {options}".strip()

    def run(self, job: Job) -> Row:
        """Return what is kept of the run. Raises RuntimeError if it failed, SkippedError if there is nothing to run."""
        directory, attempt = fresh(self._out / "runs" / job.name)
        about: Row = {**self._commit, "attempt": attempt, "directory": str(directory)}
        if job.parent:
            about |= self._branch(job, directory)
        chosen = overrides(job, self._out, directory)
        began = time.monotonic()
        self._train(chosen, self._out / "logs" / f"{job.name.replace('/', '-')}.{attempt}.log")
        about["run_s"] = round(time.monotonic() - began, 1)
        about["overrides"] = [override for override in chosen if str(self._out) not in override]
        with self._recording:
            about |= demo_record.record(directory, recipe_of(job, self._out, directory))
        versions = checkpoints(directory)
        if job.cell == "demo" and about["alarm"]:
            about["branch_version"] = after(about["alarm"]["trained"], versions)
        for version in versions:  # 12 MB each
            if job.parent or version != about.get("branch_version"):
                shutil.rmtree(directory / "checkpoints" / name_of(version))
        return about

    def stop(self) -> None:
        """End the runs that there are; they leave no line."""
        self._stopping.set()
        for process in list(self._processes):
            process.terminate()

    def _branch(self, job: Job, directory: Path) -> Row:
        parent = self._results.of(job.parent) or {}
        if parent["alarm"] is None:
            raise SkippedError("its parent raised no alarm")
        version = parent["branch_version"]
        if version is None:
            raise SkippedError("its parent raised the alarm at its end: nothing is left to be done otherwise")
        demo_record.branch(Path(parent["directory"]), directory, version, job.factor)
        return {"branch_version": version, "factor": job.factor}

    def _train(self, chosen: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*self._command, *chosen],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this program only, which ends the runs
            )
            self._processes.add(process)
            if self._stopping.is_set():
                process.terminate()
            try:
                ended = f"ended with {process.wait(self._timeout_s)}"
            except subprocess.TimeoutExpired:
                ended = f"was ended after {self._timeout_s:.0f} s"
                end(process)
            finally:
                self._processes.discard(process)
        if self._stopping.is_set() or ended != "ended with 0":
            raise RuntimeError(f"the run {ended}; see {log}")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a run to end, and end it if it does not."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def fresh(path: Path) -> tuple[Path, int]:
    """Return a directory that no earlier attempt has used, and the attempt's number from 1."""
    attempt = 1
    while (place := path if attempt == 1 else path.with_name(f"{path.name}.{attempt}")).exists():
        attempt += 1
    return place, attempt


def checkpoints(directory: Path) -> list[int]:
    """Return the versions that have a checkpoint, in order."""
    steps = (path.name.removeprefix("step-") for path in (directory / "checkpoints").glob("step-*"))
    return sorted(int(step) for step in steps if step.isdigit())


def after(version: int, versions: Sequence[int]) -> int | None:
    """Return the first of `versions` at or after `version`; None if that is the last, from which nothing goes on."""
    return next((one for one in versions[:-1] if one >= version), None)


def commit() -> Row:
    """Return which source the runs are of, and whether a file of it was changed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}


def start_tracking(store: Path) -> None:
    """Make the MLflow store before the first runs, which would otherwise make it at the same time."""
    code = f"import mlflow; mlflow.MlflowClient('sqlite:///{store}').search_experiments()"
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    if not store.exists():
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)


def arguments() -> argparse.Namespace:
    """Return what was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of results, worlds, runs and logs")
    parser.add_argument("--trial", action="store_true", help=f"seeds {TRIAL_SEEDS}, not {SEEDS[0]} to {SEEDS[-1]}")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time; one takes 4 to 5 GB")
    parser.add_argument("--until", metavar="HH:MM", help="begin none that would not end before, by the median so far")
    parser.add_argument("--minutes", type=float, metavar="N", help="the same, from now")
    parser.add_argument("--timeout", type=float, default=1_200, metavar="SECONDS", help="of a run; then it has failed")
    parser.add_argument("--retry-failed", action="store_true", help="run those again whose last line is a failure")
    parser.add_argument("--list", action="store_true", help="say what is open, and run nothing")
    return parser.parse_args()


def main() -> None:
    """Say or run what is open; a user's mistake is one line and exit code 2."""
    options = arguments()
    path = options.out.resolve() / "results.jsonl"
    try:
        until = deadline(options.until, options.minutes, datetime.now())
        seeds = TRIAL_SEEDS if options.trial else SEEDS
        chosen = select(jobs(seeds), options.cells, options.seeds)
        if options.list:
            results = Results(path)
            for job in chosen:
                row = results.of(job.name)
                print(f"{job.name}: {told(row) if row else 'open'}")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold(path):
            run(options, path, chosen, until)
    except UserError as error:
        print(f"demo_seeds: error: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace, path: Path, chosen: Sequence[Job], until: float) -> None:
    """Run what is open of `chosen` until there is no more, or no more time, or an interrupt."""
    out, results = path.parent, Results(path)
    torch.set_num_threads(1)  # a second one waits for the first wherever something else runs beside
    hf_logging.disable_progress_bar()
    start_tracking(out / STORE)
    runner = Runner(out, results, options.timeout)
    queue = Queue(jobs=chosen, results=results, kind=runner.kind, deadline=until, retry=options.retry_failed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(options.parallel) as pool:
        futures = [pool.submit(work, queue, runner.run) for _ in range(options.parallel)]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            print("ending: a run that is over is still recorded, one that is cut short leaves no line", flush=True)
            queue.interrupted.set()
            runner.stop()
    left = [job.name for job in chosen if results.of(job.name) is None]
    print(f"{len(chosen) - len(left)} of {len(chosen)} have a line; open: {', '.join(left[:5]) or 'none'}", flush=True)


if __name__ == "__main__":
    main()
