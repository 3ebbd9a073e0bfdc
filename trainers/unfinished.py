"""What a supervised training keeps beside its output until it has ended, so that a killed one goes on.

OUTPUT.checkpoint/training        hash of all that decides the trained weights; another training starts anew
                  *.npy           what was computed once with the start weights
                  checkpoints/    by optimizer step, complete or absent
                  metrics.jsonl   what MLflow is told
"""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers import checkpoint
from trainers.engine import TrainEngine
from trainers.rundir import RunDir, write_atomic
from trainers.spool import undelivered

TRAINING = "training"
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """The directory of a training that has not ended, held by this process."""

    directory: RunDir
    every: int  # optimizer steps between checkpoints
    begin: int = 0  # the step that it goes on after
    latest: Path | None = None  # its checkpoint

    def save(self, engine: TrainEngine, step: int) -> None:
        """Make a checkpoint of `step` if one is due, and delete the one before."""
        if step % self.every:
            return
        root = self.directory.checkpoints
        checkpoint.save(root, step, lambda path: engine.save(path, {}), {"step": step})
        checkpoint.prune(root, 1)

    def once(self, name: str, compute: Callable[[], Any]) -> NDArray[Any]:
        """Return the array that `compute` gave when it was first asked for under `name`, in whichever process."""
        path = self.directory.path / f"{name}.npy"
        if not path.exists():
            content = io.BytesIO()
            np.save(content, np.asarray(compute()))
            write_atomic(path, content.getvalue())
        return np.asarray(np.load(path))

    def end(self) -> None:
        """Delete all of it, or all but records that MLflow has not received yet."""
        if not undelivered(self.directory.metrics):
            shutil.rmtree(self.directory.path)
            return
        shutil.rmtree(self.directory.checkpoints, ignore_errors=True)
        for path in self.directory.path.glob("*.npy"):
            path.unlink()


@contextmanager
def unfinished(output: str | Path, training: str, every: int, log: Log) -> Iterator[Unfinished]:
    """Hold the directory beside `output`; one of another `training` (its hash) is cleared, which is said in one line.

    Raises UserError if another process holds it.
    """
    directory = _directory(output)
    directory.path.mkdir(parents=True, exist_ok=True)
    with directory.lock("output"):
        if not holds(output, training):
            if (directory.path / TRAINING).exists():
                log(f"{directory.path}: of another configuration, start weights or rows; starting anew")
            _clear(directory.path)
        write_atomic(directory.path / TRAINING, training + "\n")
        found = checkpoint.find_latest(directory.checkpoints)
        path, begin = (None, 0) if found is None else (found[0], int(found[1]["step"]))
        yield Unfinished(directory=directory, every=every, begin=begin, latest=path)


def holds(output: str | Path, training: str) -> bool:
    """Whether what lies beside `output` is of this training."""
    path = _directory(output).path / TRAINING
    return path.exists() and path.read_text().strip() == training


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name not in ("lock", TRAINING):  # that is overwritten last: a kill in here is followed by another go
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _directory(output: str | Path) -> RunDir:
    path = Path(output)
    return RunDir(path.with_name(f"{path.name}.checkpoint"))
