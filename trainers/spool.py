"""A durable local queue in front of the tracking server.

Records go to a JSONL file first; a thread sends them on from there and notes how far it came. They are
sent verbatim, so sending some twice changes nothing, and a server may be away for as long as it likes.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from configs.errors import UserError
from trainers.rundir import write_atomic

Record = dict[str, Any]

BATCH = 500  # records a call
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between attempts
INCARNATION = "run/incarnation"  # a point of this metric where an incarnation took up the run
NEEDED = {"kind"}  # of every record
FIELDS = {  # that readers need, by kind
    "metric": {"kind", "key", "value", "step", "timestamp"},
    "param": {"kind", "key", "value"},
    "tag": {"kind", "key", "value"},
}

log = logging.getLogger(__name__)


class UnavailableError(Exception):
    """The server did not take the records now; the same records may go later."""


class RejectedError(Exception):
    """The server will never take a record as it is."""


class Sink(Protocol):
    """Where records go. Sending the same records twice must equal sending them once."""

    def open(self) -> str:
        """Connect and return who is there (the run's id). Raises UnavailableError."""

    def send(self, records: Sequence[Record]) -> None:
        """Deliver records in order. Raises UnavailableError or RejectedError."""


class Outages:
    """Says once that something keeps records from a destination, and once that it no longer does."""

    def __init__(self, destination: str) -> None:
        self.destination = destination  # as it may be printed
        self._held_up: dict[str, set[Path]] = {}  # problem -> the spools that have it
        self._lock = threading.Lock()

    def away(self, spool: Path, problem: str) -> None:
        """Note that `spool` cannot deliver for now."""
        with self._lock:
            known = self._held_up.setdefault(problem, set())
            if not known:
                log.warning(
                    "tracking: %s %s; the run goes on, records are kept in %s and sent later",
                    self.destination,
                    problem,
                    spool.parent,
                )
            known.add(spool)

    def back(self, spool: Path) -> None:
        """Note that `spool` delivers."""
        with self._lock:
            for problem, spools in list(self._held_up.items()):
                spools.discard(spool)
                if not spools:
                    del self._held_up[problem]
                    log.warning("tracking: %s takes records again", self.destination)


class Spool:
    """An append-only file of records and the thread that delivers it.

    `append` returns when the records are on disk and never waits for the server. How far the delivery
    came is kept in `<path>.sent` with the id of the receiver: another receiver gets everything.
    """

    def __init__(self, path: Path, sink: Sink, outages: Outages) -> None:
        self.path = path
        self._sink = sink
        self._outages = outages
        self._clock = _mend(path)
        self._file = path.open("ab")
        self._durable = self._file.tell()  # bytes on disk
        self._sent = self._progress(None)  # bytes delivered
        self._closing = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._deliver, name=f"spool {path.name}", daemon=True)
        self._thread.start()

    def now(self) -> int:
        """Return the time in ms, later than all of earlier incarnations and never running backwards."""
        self._clock = max(self._clock, time.time_ns() // 1_000_000)
        return self._clock

    def append(self, records: Iterable[Record]) -> None:
        """Add records; they are on disk when this returns."""
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        with self._changed:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._durable += len(lines)
            self._changed.notify_all()

    def drain(self, deadline_s: float) -> bool:
        """Wait at most `deadline_s` until all is delivered; say whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._sent == self._durable, deadline_s)

    def close(self, deadline_s: float) -> int:
        """Deliver what can be delivered in `deadline_s`, stop, and return how many records remain."""
        with self._changed:
            self._closing = True  # no long pauses any more
            self._changed.notify_all()
        self.drain(deadline_s)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            self._file.close()
            return sum(1 for _ in _lines_from(self.path, self._sent))

    def _deliver(self) -> None:
        receiver: str | None = None
        pause = FIRST_PAUSE_S
        while self._work_waits():
            try:
                if receiver is None:
                    receiver = self._sink.open()
                    self._sent = self._progress(receiver)
                self._pass_on(receiver)
            except (UnavailableError, FileNotFoundError) as problem:
                if self._stopped:  # meanwhile: `close` has told what remains, and the directory may be gone since
                    return
                if isinstance(problem, FileNotFoundError):
                    raise
                self._outages.away(self.path, str(problem))
                self._rest(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._outages.back(self.path)
                pause = FIRST_PAUSE_S

    def _work_waits(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._sent < self._durable)
            return not self._stopped

    def _rest(self, pause: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._closing, pause):
                return
            self._changed.wait_for(lambda: self._stopped, FIRST_PAUSE_S)

    def _pass_on(self, receiver: str) -> None:
        lines = list(islice(_lines_from(self.path, self._sent), BATCH))
        records = [json.loads(line) for line in lines]
        try:
            self._sink.send(records)
        except RejectedError:
            self._one_by_one(records)
        sent = self._sent + sum(map(len, lines))
        write_atomic(_progress_path(self.path), json.dumps({"receiver": receiver, "bytes": sent}) + "\n")
        with self._changed:
            self._sent = sent
            self._changed.notify_all()

    def _one_by_one(self, records: Sequence[Record]) -> None:
        """Deliver the good ones; put what is refused for good beside the spool and say so."""
        for record in records:
            try:
                self._sink.send([record])
            except RejectedError as problem:
                aside = self.path.with_suffix(".rejected.jsonl")
                with aside.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                log.warning("tracking: a record was refused (%s); it is kept in %s", problem, aside)

    def _progress(self, receiver: str | None) -> int:
        """Bytes already delivered to `receiver`; None: to whoever it was."""
        try:
            progress = json.loads(_progress_path(self.path).read_bytes())
        except (FileNotFoundError, ValueError):
            return 0
        same = receiver is None or progress["receiver"] == receiver
        return min(int(progress["bytes"]), self._durable) if same else 0


def read(path: Path) -> Iterator[Record]:
    """Yield the records of a spool file. Raises UserError naming the first line that is none."""
    for number, line in enumerate(_lines_from(path, 0), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not FIELDS.get(str(record.get("kind")), NEEDED) <= record.keys():
            raise UserError(f"{path}:{number}: damaged, or not written by a run: restore or delete the line")
        yield record


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return per metric key the points (policy version, value) that no resume has taken back."""
    points: dict[str, list[tuple[int, int, float]]] = {}
    for record in read(path):
        if record["kind"] == "metric":
            points.setdefault(record["key"], []).append((record["step"], record["timestamp"], record["value"]))
    starts = [(step, timestamp) for step, timestamp, _ in points.get(INCARNATION, [])]
    return {key: surviving(of_key, starts) for key, of_key in points.items()}


def surviving(points: Iterable[tuple[int, int, float]], starts: Sequence[tuple[int, int]]) -> list[tuple[int, float]]:
    """Return (step, value) in step order, the last of each step, without what was rolled back.

    `points` are (step, timestamp, value); `starts` are the (step, timestamp) at which incarnations took up
    the run: whatever was logged before and lies beyond that step was rolled back.
    """
    last: dict[int, tuple[int, float]] = {}
    for step, timestamp, value in points:
        if any(timestamp < started and step > begin for begin, started in starts):
            continue
        if step not in last or last[step][0] <= timestamp:
            last[step] = (timestamp, value)
    return [(step, value) for step, (_, value) in sorted(last.items())]


def undelivered(path: Path) -> bool:
    """Whether a spool file holds records that nobody is known to have received."""
    try:
        sent = int(json.loads(_progress_path(path).read_bytes())["bytes"])
    except (FileNotFoundError, ValueError):
        sent = 0
    return path.exists() and sent < path.stat().st_size


def _mend(path: Path) -> int:
    """Cut off a record that a kill left unfinished; return a time after all records, in ms."""
    path.touch()
    durable = sum(map(len, _lines_from(path, 0)))
    if durable < path.stat().st_size:
        os.truncate(path, durable)
    return max((record.get("timestamp", 0) for record in read(path)), default=-1) + 1


def _lines_from(path: Path, start: int) -> Iterator[bytes]:
    """Yield the whole lines from a byte offset on."""
    with path.open("rb") as file:
        file.seek(start)
        yield from (line for line in file if line.endswith(b"\n"))


def _progress_path(path: Path) -> Path:
    return path.with_suffix(".sent")
