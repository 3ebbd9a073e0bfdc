"""What a supervised training tells MLflow: the loss by optimizer step, what it reached on held-out rows, and of what.

Its runs are in an experiment of their own, `<tracking.experiment>-offline`, so that `headroom compare` on an experiment
finds online runs only. Records are in `metrics.jsonl` beside the unfinished training, until they are delivered.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from configs.schema import Offline, Recipe
from trainers.redact import masked, printable_uri, short
from trainers.rundir import RunDir, flatten
from trainers.spool import INCARNATION, Outages, Spool
from trainers.tracking import FLUSH_S, INTERRUPTED_S, MlflowSink, git_tags, metric_key

log = logging.getLogger(__name__)


class TrainingTracker:
    """Records one launch of a supervised training; nothing here waits for the server, but its end, a while.

    Called with an optimizer step and values by name: train/loss, train/grad_norm, train/learning_rate, holdout/loss,
    holdout/accuracy.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        config: Offline,
        rows_hash: str,
        directory: RunDir,
        step: int,
        *,
        flush_s: float = FLUSH_S,
    ) -> None:
        """Take up the training `name` after `step`; `directory` has its records; flush_s: what its end may take."""
        settings = recipe.tracking
        self._directory = directory
        self._flush_s = flush_s
        self._outages = Outages(printable_uri(settings.uri))
        sink = MlflowSink(settings.uri, f"{settings.experiment}-offline", f"{recipe.run.name} {name}", directory)
        self._spool = Spool(directory.metrics, sink, self._outages)
        self._status("RUNNING")
        self(step, {INCARNATION: directory.next_incarnation()})
        section: dict[str, Any] = masked(config.model_dump(mode="json"))
        section["base"] = section["base"] or recipe.model.path
        self._spool.append(
            {
                "kind": "param",
                "key": metric_key(key),
                "value": short(value if isinstance(value, str) else json.dumps(value)),
            }
            for key, value in flatten(section).items()
        )
        path, local = config.data.path, Path(config.data.path).exists()
        self._spool.append([{
            "kind": "dataset", "name": path, "digest": rows_hash[:36], "context": "training", "profile": {},
            "source_type": "local" if local else "hugging_face",
            "source": {"uri": path} if local else {"path": path, "split": config.data.source_split},
        }])  # fmt: skip
        tags = {**git_tags(), **masked(settings.tags), "headroom.training": name, "headroom.output": config.output}
        self._spool.append({"kind": "tag", "key": key, "value": short(value, 4000)} for key, value in tags.items())

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note values at an optimizer step."""
        now = self._spool.now()
        self._spool.append(
            {"kind": "metric", "key": key, "value": float(value), "step": step, "timestamp": now}
            for key, value in metrics.items()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._status("KILLED" if interrupted else "FAILED" if kind else "FINISHED")
        if remaining := self._spool.close(INTERRUPTED_S if interrupted else self._flush_s):
            log.warning(
                "tracking: %d records are not at %s yet; they are kept in %s and are sent when the command is repeated",
                remaining,
                self._outages.destination,
                self._directory.path,
            )

    def _status(self, status: str) -> None:
        self._spool.append([{"kind": "status", "value": status, "timestamp": self._spool.now()}])
