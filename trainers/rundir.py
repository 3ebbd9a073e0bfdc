"""One run's directory: where everything lies, who may write to it, and with which config."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from configs.errors import UserError

# What a resumed run may change: none of it alters what the steps already taken mean.
FREE_KEYS = (
    "run.name",
    "run.steps",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.dir",
    "evaluation.final",
    "tracking",
    "ray",
    "alarm",
)
SHOWN_CHANGES = 6


def sync_directory(path: Path) -> None:
    """Make a creation or rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing of it, durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)


def content_hash(value: Any) -> str:
    """Return the sha256 of `value` as canonical JSON, hex: a config group, or the rows of a dataset."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a.b": leaf}`; lists and empty mappings are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ and may not, as `{key: (old, new)}`."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
    }


@dataclass(frozen=True, slots=True)
class Lock:
    """An exclusive hold on a run directory; the kernel drops it when the process dies."""

    file: IO[str]

    def release(self) -> None:
        """Let another launch have the directory."""
        self.file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class RunDir:
    """The layout of a run directory."""

    path: Path

    @property
    def ledger(self) -> Path:
        """What was trained and discarded, a line per step."""
        return self.path / "ledger.jsonl"

    @property
    def rolled_back(self) -> Path:
        """Ledger lines of steps that a resume took back."""
        return self.path / "ledger.rolled_back.jsonl"

    @property
    def metrics(self) -> Path:
        """Spool of metrics, parameters and tags."""
        return self.path / "metrics.jsonl"

    @property
    def artifacts(self) -> Path:
        """Spool of files and models to register."""
        return self.path / "artifacts.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints by step."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Per-prompt scores and samples by version."""
        return self.path / "evaluations"

    @property
    def final(self) -> Path:
        """What was evaluated when training ended, by the last version of the curve then."""
        return self.path / "final"

    @property
    def samples(self) -> Path:
        """Tables of sample completions by version."""
        return self.path / "samples"

    @property
    def config(self) -> Path:
        """The resolved config, readable by its owner only: it may hold secrets."""
        return self.path / "config.yaml"

    @property
    def datasets(self) -> Path:
        """Content hashes of the datasets."""
        return self.path / "datasets.json"

    @property
    def mlflow_run_id(self) -> Path:
        """The MLflow run this directory belongs to, once a server has answered."""
        return self.path / "mlflow_run_id"

    def create(self) -> "RunDir":
        """Make the directories. Raises UserError where that is impossible."""
        try:
            for directory in (self.path, self.checkpoints, self.evaluations, self.samples):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.dir: {self.path} cannot be created ({error.strerror}); choose another run.dir"
            ) from None
        return self

    def lock(self, key: str = "run.dir") -> Lock:
        """Hold the directory until released or dead. Raises UserError naming the holder, and the key to change."""
        file = (self.path / "lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"{self.path}: another launch (process {holder}) is writing to this run directory; "
                f"wait for it or end it, or choose another {key}"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        return Lock(file)

    def next_incarnation(self) -> int:
        """Count one more launch on this directory, from 0, durably. Call it under the lock."""
        path = self.path / "incarnation"
        incarnation = int(path.read_text()) + 1 if path.exists() else 0
        write_atomic(path, f"{incarnation}\n")
        return incarnation

    def uid(self) -> str:
        """Return this directory's own id, drawn once."""
        path = self.path / "uid"
        if not path.exists():
            write_atomic(path, uuid.uuid4().hex + "\n")
        return path.read_text().strip()

    def forget_after(self, version: int) -> None:
        """Delete evaluations and samples of versions that a resume rolled back."""
        for path in (*self.evaluations.glob("version-*"), *self.samples.glob("version-*"), *self.final.glob("*-*")):
            if int(path.stem.rpartition("-")[2]) > version:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def adopt_config(self, config: Mapping[str, Any]) -> bool:
        """Keep `config` as this run's, and say whether there was one before.

        Raises UserError with the differing keys if the run was started with another config; keys that
        do not change what its steps mean (`FREE_KEYS`) may differ.
        """
        resumed = self.config.exists()
        if resumed:
            changes = config_changes(yaml.safe_load(self.config.read_text()), _plain(config))
            if changes:
                raise UserError(f"{self.config}: {_described(changes)}; restore these values or choose another run.dir")
        write_atomic(self.config, yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))
        self.config.chmod(0o600)
        return resumed

    def adopt_datasets(self, hashes: Mapping[str, str]) -> None:
        """Keep the datasets' content hashes by name. Raises UserError if one is not the run's any more."""
        if self.datasets.exists():
            known: dict[str, str] = json.loads(self.datasets.read_text())
            changes = {
                name: (known[name][:12], hashes[name][:12])
                for name in sorted(known.keys() & hashes.keys())
                if known[name] != hashes[name]
            }
            if changes:
                raise UserError(f"{self.datasets}: {_described(changes)}; restore the data or choose another run.dir")
            hashes = known | dict(hashes)
        write_atomic(self.datasets, json.dumps(dict(hashes), indent=2) + "\n")


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """As it will look when read back: tuples are lists, paths are strings."""
    plain: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    return plain


def _described(changes: Mapping[str, tuple[Any, Any]]) -> str:
    shown = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in list(changes.items())[:SHOWN_CHANGES])
    more = f" and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
    return f"this run was started with other values ({shown}{more})"
