"""Many runs, one after the other or a few at a time: each leaves a line, what has a line is not run again."""

import fcntl
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any

from benchmarks.demo_plan import Job
from configs.errors import UserError

GUESS_S = 300.0  # of a run while none has finished
Row = dict[str, Any]


class SkippedError(Exception):
    """There is nothing to run: the run to branch from raised no alarm, or only at its end."""


class Results:
    """The lines of results.jsonl; the last one of a job counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = [json.loads(line) for line in whole_lines(path).splitlines()]
        self._lock = threading.Lock()

    def of(self, job: str | None) -> Row | None:
        """Return the job's last line."""
        return next((row for row in reversed(self.rows) if row["job"] == job), None)

    def append(self, row: Row) -> None:
        """Add one line; it is on disk when this returns."""
        with self._lock, self.path.open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.rows.append(row)

    def expected_s(self, kind: str) -> float:
        """Return how long a run of this kind takes: the median so far, of all kinds if there is none of it."""
        done = [row for row in self.rows if row["status"] == "done"]
        alike = [row["total_s"] for row in done if row["kind"] == kind] or [row["total_s"] for row in done]
        return statistics.median(alike) if alike else GUESS_S


def whole_lines(path: Path) -> bytes:
    """Return the file without a last line that a kill cut short, or that is being written."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def hold(path: Path) -> IO[str]:
    """Keep other processes from writing to `path` until this one ends, and cut off what a kill left of a line.

    Raises UserError if another process holds it.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is adding to it; wait for it, or choose another directory") from None
    os.truncate(path, len(whole_lines(path)))
    return file


@dataclass(slots=True, kw_only=True)
class Queue:
    """Which job is next; shared by the threads that run them."""

    jobs: Sequence[Job]
    results: Results
    kind: Callable[[Job], str]  # jobs of a kind take equally long
    deadline: float  # on the clock; no job is begun that would not end before it
    clock: Callable[[], float] = time.time
    retry: bool = False  # those whose last line is a failure
    interrupted: threading.Event = field(default_factory=threading.Event)
    _taken: set[str] = field(default_factory=set)
    _closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> Job | None:
        """Return the next job that is open and whose parent is done; None: there is none, or no time for it."""
        with self._lock:
            job = next((one for one in self.jobs if self._open(one)), None)
            if job is None or self._closed or self.interrupted.is_set():
                return None
            if self.clock() + self.results.expected_s(self.kind(job)) > self.deadline:
                self._closed = True  # a shorter one further down must not overtake: cost would choose the cells
                return None
            self._taken.add(job.name)
            return job

    def _open(self, job: Job) -> bool:
        row = self.results.of(job.name)
        if job.name in self._taken or (row is not None and not (self.retry and row["status"] == "failed")):
            return False
        parent = self.results.of(job.parent)
        return job.parent is None or (parent is not None and parent["status"] == "done")


def work(queue: Queue, run: Callable[[Job], Row], say: Callable[[str], None] = print) -> None:
    """Run jobs until there is none; what goes wrong in one is its line. Interrupted ones leave no line."""
    while (job := queue.next()) is not None:
        row: Row = {"job": job.name, "cell": job.cell, "seed": job.seed, "parent": job.parent, "kind": queue.kind(job)}
        row["started"] = datetime.now().astimezone().isoformat(timespec="seconds")
        began = queue.clock()
        try:
            found = row | {"status": "done"} | run(job)
            json.dumps(found, allow_nan=False)
        except SkippedError as why:
            found = row | {"status": "skipped", "error": str(why)}
        except Exception as error:  # one run's trouble is not the others', and is told
            if queue.interrupted.is_set():
                return
            found = row | {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        found["total_s"] = round(queue.clock() - began, 1)
        queue.results.append(found)
        say(f"{time.strftime('%H:%M:%S')} {job.name}: {told(found)}, {found['total_s']:.0f} s")


def told(row: Mapping[str, Any]) -> str:
    """Return a finished job in a few words."""
    if row["status"] != "done":
        return f"{row['status']}: {row['error']}"
    truth, alarm = row["truth"], row["alarm"]
    raised = f"{alarm['state']} at {alarm['version']}" if alarm else "no alarm"
    fell = "fell" if truth["fell"] else "did not fall"
    return f"{raised}; gold's peak {truth['peak_version']}, it {fell}; chosen {row['findings']['chosen_version']}"


def deadline(until: str | None, minutes: float | None, now: datetime) -> float:
    """Return the time, in seconds since 1970, at which all must have ended: `until` HH:MM is the next such time.

    Raises UserError for what is no time of day.
    """
    if until is None:
        return float("inf") if minutes is None else (now + timedelta(minutes=minutes)).timestamp()
    try:
        clock = datetime.strptime(until, "%H:%M")
    except ValueError:
        raise UserError(f"--until {until}: give a time of day as HH:MM") from None
    at = now.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
    return (at if at > now else at + timedelta(days=1)).timestamp()


def select(every: Iterable[Job], cells: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Job]:
    """Return the jobs of these cells and seeds, all by default. Raises UserError for one that there is not."""
    every = list(every)
    for option, given, known in (
        ("--cells", cells, dict.fromkeys(job.cell for job in every)),
        ("--seeds", seeds, dict.fromkeys(job.seed for job in every)),
    ):
        if unknown := [one for one in given or () if one not in known]:
            raise UserError(f"{option} {unknown[0]}: not in the plan, which has {', '.join(map(str, known))}")
    return [job for job in every if (not cells or job.cell in cells) and (not seeds or job.seed in seeds)]
