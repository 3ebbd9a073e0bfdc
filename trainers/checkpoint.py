"""Checkpoints that are complete or absent.

    checkpoints/step-000010/manifest.json     what belongs to it: size and sha256 of each file, and the meta

A checkpoint is written beside its place, flushed to disk and then renamed into it, so a kill leaves
either all of it or a temporary directory that the next save clears away.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainers.rundir import content_hash, sync_directory, write_atomic

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"

log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint does not hold what its manifest says."""


def name_of(step: int) -> str:
    """Return the directory name of a step's checkpoint."""
    return f"step-{step:06d}"


def save(root: Path, step: int, write: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
    """Have `write` fill a directory and make it the checkpoint of `step`, all or nothing.

    `meta` is JSON: step, data position (retired prompts), version, incarnation, mlflow run id. An older
    checkpoint of the same step, left by steps that were rolled back, is replaced. Errors of `write` propagate.
    """
    root.mkdir(parents=True, exist_ok=True)
    clear_leftovers(root)
    final, temporary = root / name_of(step), root / f"{TEMPORARY}{name_of(step)}"
    temporary.mkdir()
    write(temporary)
    body = {"step": step, "meta": dict(meta), "files": _describe(temporary)}
    manifest = body | {"digest": content_hash(body)}
    write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    for directory in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync_directory(directory)
    if final.exists():
        final.rename(root / f"{TEMPORARY}replaced-{final.name}")
    temporary.rename(final)
    sync_directory(root)
    clear_leftovers(root)
    return final


def verify(path: Path) -> dict[str, Any]:
    """Return the meta of a checkpoint after reading all of it. Raises CheckpointError saying what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        digest, files, meta = manifest.pop("digest"), manifest["files"], dict(manifest["meta"])
    except FileNotFoundError:
        raise CheckpointError(f"it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST} is not readable") from None
    if content_hash(manifest) != digest:
        raise CheckpointError(f"{MANIFEST} was changed")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(f"{name} has {file.stat().st_size} bytes instead of {expected['size']}")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{name} is corrupt (sha256 differs)")
    return meta


def find_latest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its meta; name every broken one that is passed over."""
    for leftover in sorted(root.glob(f"{TEMPORARY}step-*")):
        log.warning("checkpoint %s: half-written when its run ended; skipped", root / leftover.name[len(TEMPORARY) :])
    for _, path in sorted(_checkpoints(root).items(), reverse=True):
        try:
            return path, verify(path)
        except CheckpointError as problem:
            log.warning("checkpoint %s: %s; skipped, trying the one before it", path, problem)
    return None


def prune(root: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest checkpoints; return what went."""
    checkpoints = _checkpoints(root)
    gone = [checkpoints[step] for step in sorted(checkpoints)[:-keep]]
    for path in gone:
        path.rename(root / f"{TEMPORARY}pruned-{path.name}")  # a kill while deleting leaves no half checkpoint
    clear_leftovers(root)
    return gone


def clear_leftovers(root: Path) -> None:
    """Remove what a killed save or prune left behind. Only the holder of the run's lock may."""
    for path in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def _checkpoints(root: Path) -> dict[int, Path]:
    steps = ((path.name.removeprefix("step-"), path) for path in sorted(root.glob("step-*")) if path.is_dir())
    return {int(step): path for step, path in steps if step.isdigit()}


def _describe(directory: Path) -> dict[str, dict[str, int | str]]:
    """Flush every file to disk and return its size and hash."""
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
