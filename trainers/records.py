"""Per-prompt scores and sample tables as files: complete or absent, one directory a version."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from trainers.rundir import sync_directory, write_atomic
from trainers.types import Evaluation


def write_evaluations(root: Path, results: Sequence[Evaluation]) -> Path:
    """Write all tasks of one version to `root/version-000010/<task>.json`, samples beside it."""
    final = root / f"version-{results[0].version:06d}"
    temporary = root / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for result in results:
        scores = {metric: [float(score) for score in of_metric] for metric, of_metric in result.scores.items()}
        body = {"version": result.version, "task": result.task, "prompt_uids": result.prompt_uids, "scores": scores}
        write_atomic(temporary / f"{result.task}.json", _json(body) + "\n")
        samples = "".join(_json(sample) + "\n" for sample in result.samples)
        write_atomic(temporary / f"{result.task}.samples.jsonl", samples)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync_directory(root)
    return final


def read_evaluations(root: Path) -> dict[int, list[Evaluation]]:
    """Return what `write_evaluations` wrote, by version; an undefined score is NaN.

    Raises UserError naming a record that cannot be read, by its path from the parent of `root`.
    """
    found: dict[int, list[Evaluation]] = {}
    for path in sorted(root.glob("version-*/*.json")):
        try:
            evaluation = _read_evaluation(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # whatever a damaged file holds
            what = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError):
                what = f"{Path(error.filename or path).name}: {error.strerror}"
            where = path.relative_to(root.parent)
            raise UserError(f"{where}: damaged record of an evaluation ({what}); restore or delete it") from error
        found.setdefault(evaluation.version, []).append(evaluation)
    return found


def read_final(root: Path) -> dict[int, dict[str, dict[int, list[Evaluation]]]]:
    """Return the finished samples of the end of a run: last version of the curve -> sample -> version -> tasks."""
    return {
        int(path.name.removeprefix("version-")): {part.name: read_evaluations(part) for part in sorted(path.iterdir())}
        for path in sorted(root.glob("version-*"))
    }


def _read_evaluation(path: Path) -> Evaluation:
    body = json.loads(path.read_text(encoding="utf-8"))
    samples = path.with_suffix(".samples.jsonl").read_text(encoding="utf-8").split("\n")  # a text may hold U+2028
    prompts = tuple(body["prompt_uids"])
    scores = {
        metric: np.array([math.nan if score is None else score for score in of_metric], np.float32)
        for metric, of_metric in body["scores"].items()
    }
    for metric, of_metric in scores.items():
        if of_metric.shape != (len(prompts),):
            raise ValueError(f"{len(of_metric)} scores of {metric} for {len(prompts)} prompts")
    return Evaluation(
        version=int(body["version"]),
        task=str(body["task"]),
        prompt_uids=prompts,
        scores=scores,
        samples=tuple(json.loads(sample) for sample in samples if sample),
    )


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as the table format that MLflow's pages show."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_atomic(path, _json({"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}))
    return path


def _json(value: Any) -> str:
    return json.dumps(_strict(value), ensure_ascii=False, default=_item)


def _strict(value: Any) -> Any:
    """NaN and infinity are no JSON: they become null."""
    if isinstance(value, Mapping):
        return {key: _strict(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(child) for child in value]
    if isinstance(value, np.generic):
        return _strict(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _item(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
