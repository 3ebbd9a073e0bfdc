"""Everything a run tells MLflow, by way of durable local files: the one home of mlflow.

`Tracker` turns what happens into records and never waits; `MlflowSink` delivers them from another thread.
"""

import json
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from configs.schema import Recipe
from trainers.ledger import Ledger
from trainers.records import read_evaluations, write_evaluations, write_table
from trainers.redact import masked, printable_uri, short
from trainers.rundir import RunDir, content_hash, flatten, write_atomic
from trainers.spool import INCARNATION, Outages, Record, RejectedError, Spool, UnavailableError, surviving
from trainers.types import Evaluation

HASHED_GROUPS = ("model", "reward", "algorithm", "evaluation", "data")
FLUSH_S = 20.0  # how long the end of a run waits for the server
INTERRUPTED_S = 3.0  # the same, where somebody waits for the end
SYSTEM_METRICS_S = 10.0
RUN_UID = "headroom.run_uid"  # finds the run again if a kill came between its creation and our note of it
LISTED_TABLES = 40  # that the MLflow page offers; the tag that lists them is bounded
HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # we retry ourselves
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")

BATCH = 100  # MLflow's limit for parameters and tags in one call
T = TypeVar("T")

log = logging.getLogger(__name__)


class MlflowSink:
    """Delivers records to one MLflow run, which it finds or creates; sending twice equals sending once."""

    def __init__(self, uri: str, experiment: str, run_name: str, rundir: RunDir) -> None:
        self._uri = uri
        self._experiment = experiment
        self._run_name = run_name
        self._rundir = rundir
        self._run_id = ""
        self._lock = threading.Lock()
        self._send = {
            "metric": self._metrics,
            "param": self._params,
            "tag": self._tags,
            "status": self._status,
            "dataset": self._datasets,
            "artifact": self._artifacts,
            "model": self._models,
        }
        for name, value in HTTP_SETTINGS.items():
            os.environ.setdefault(name, value)
        for noisy in ("mlflow.store.db.utils", "mlflow.tracking.fluent", "alembic"):  # a new store's first launch
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # `Outages` says it once

    def open(self) -> str:
        """Return the id of this directory's run. Raises UnavailableError."""
        with self._lock:
            if not self._run_id:
                self._run_id = self._attempt(self._find_or_create)
                write_atomic(self._rundir.mlflow_run_id, self._run_id + "\n")
            return self._run_id

    def send(self, records: Sequence[Record]) -> None:
        """Deliver records in order. Raises UnavailableError or RejectedError."""
        for kind, of_kind in groupby(records, key=lambda record: record["kind"]):
            listed = list(of_kind)
            for start in range(0, len(listed), BATCH):
                self._attempt(partial(self._send[kind], listed[start : start + BATCH]))

    def _attempt(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except MlflowException as error:
            if error.error_code in REFUSED and self._active():
                raise RejectedError(short(error.message, 200)) from None
            raise UnavailableError(_problem(error)) from error
        except Exception as error:  # a boundary: artifact stores raise whatever their library raises
            raise UnavailableError(_problem(error)) from error

    def _active(self) -> bool:
        """Whether the run takes records at all: a deleted run refuses them, but may be restored."""
        try:
            return not self._run_id or self._client.get_run(self._run_id).info.lifecycle_stage == "active"
        except MlflowException:
            return False

    def _find_or_create(self) -> str:
        mlflow.set_tracking_uri(self._uri)
        self._client = mlflow.MlflowClient(self._uri)
        known = self._rundir.mlflow_run_id
        if known.exists():
            try:
                run = self._client.get_run(known.read_text().strip())
                if run.info.lifecycle_stage == "active":
                    self._experiment_id = run.info.experiment_id
                    return str(run.info.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            log.warning("tracking: run %s is not at this server; a new run gets all records", known.read_text().strip())
        self._experiment_id = mlflow.set_experiment(self._experiment).experiment_id
        uid = self._rundir.uid()
        found = self._client.search_runs([self._experiment_id], f"tags.`{RUN_UID}` = '{uid}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        return str(
            self._client.create_run(self._experiment_id, tags={RUN_UID: uid}, run_name=self._run_name).info.run_id
        )

    def _metrics(self, records: Sequence[Record]) -> None:
        points = [Metric(r["key"], r["value"], r["timestamp"], r["step"]) for r in records]
        self._client.log_batch(self._run_id, metrics=points)

    def _params(self, records: Sequence[Record]) -> None:
        known = self._client.get_run(self._run_id).data.params
        self._client.log_batch(
            self._run_id,
            params=[Param(r["key"], r["value"]) for r in records if r["key"] not in known],
            tags=[  # MLflow's parameters are for ever; what a resume may change is shown as a tag
                RunTag(f"resumed.{r['key']}", r["value"])
                for r in records
                if known.get(r["key"], r["value"]) != r["value"]
            ],
        )

    def _tags(self, records: Sequence[Record]) -> None:
        self._client.log_batch(self._run_id, tags=[RunTag(r["key"], r["value"]) for r in records])

    def _status(self, records: Sequence[Record]) -> None:
        for record in records:
            if record["value"] == "RUNNING":
                self._client.update_run(self._run_id, status="RUNNING")
            else:
                self._client.set_terminated(self._run_id, record["value"], end_time=record["timestamp"])

    def _datasets(self, records: Sequence[Record]) -> None:
        inputs = [
            DatasetInput(
                Dataset(
                    r["name"], r["digest"], r["source_type"], json.dumps(r["source"]), profile=json.dumps(r["profile"])
                ),
                [InputTag("mlflow.data.context", r["context"])],
            )
            for r in records
        ]
        self._client.log_inputs(self._run_id, inputs)

    def _artifacts(self, records: Sequence[Record]) -> None:
        for record in records:
            path = self._rundir.path / record["path"]
            if not path.exists():
                raise MlflowException(f"{path} is gone", error_code=3)
            self._client.log_artifact(self._run_id, str(path), record["folder"])

    def _models(self, records: Sequence[Record]) -> None:
        for record in records:
            ours = f"source_run_id = '{self._run_id}' AND name = '{record['name']}'"
            if not self._client.search_logged_models([self._experiment_id], ours, max_results=1):
                mlflow.create_external_model(
                    record["name"], self._run_id, record["tags"], model_type="policy", experiment_id=self._experiment_id
                )


class Tracker:
    """Records one incarnation of a run; nothing here waits for the server."""

    def __init__(self, recipe: Recipe, rundir: RunDir, *, incarnation: int) -> None:
        """Take up the run where its ledger, rolled back before, ends."""
        settings = recipe.tracking
        self._rundir = rundir
        self._incarnation = incarnation
        self._version = max((entry.version for entry in Ledger(rundir.ledger)), default=0)
        self._finished = threading.Event()
        rundir.forget_after(self._version)
        self._outages = Outages(printable_uri(settings.uri))
        sink = MlflowSink(settings.uri, settings.experiment, recipe.run.name, rundir)
        self._spool = Spool(rundir.metrics, sink, self._outages)
        self._files = Spool(rundir.artifacts, sink, self._outages)
        self._status("RUNNING")
        self.log_metrics(self._version, {INCARNATION: incarnation})
        self._log_config(recipe)
        if settings.system_metrics:
            threading.Thread(target=self._watch_node, name="system metrics", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run; None as long as no server has answered."""
        path = self._rundir.mlflow_run_id
        return path.read_text().strip() if path.exists() else None

    def log_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        """Log values at a policy version, by the names of docs/metrics.md."""
        self._version = version
        self._append_metrics(version, metrics)

    def log_node(self, node: str, metrics: Mapping[str, float]) -> None:
        """Log what a `NodeMonitor` of another node sampled."""
        self._append_metrics(self._version, {f"system/{node}/{key}": value for key, value in metrics.items()})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._spool.append({"kind": "tag", "key": key, "value": short(str(value), 4000)} for key, value in tags.items())

    def log_dataset(
        self, name: str, *, digest: str, source: str, context: Literal["training", "evaluation"], **profile: Any
    ) -> None:
        """Note a dataset: `digest` hashes its rows, `source` is a file or public id, `profile` holds counts."""
        local = Path(source).exists()
        place = {"uri": source} if local else {"path": source, "split": profile.get("split")}
        self._spool.append([{
            "kind": "dataset", "name": name, "digest": digest[:36], "context": context, "profile": profile,
            "source_type": "local" if local else "hugging_face", "source": place,
        }])  # fmt: skip

    def log_samples(self, version: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep sample completions as the table of a version."""
        self._file(write_table(self._rundir.samples / f"version-{version:06d}.json", rows), "samples")
        tables = sorted(path.name for path in self._rundir.samples.glob("version-*.json"))
        listed = [
            {"path": f"samples/{name}", "type": "table"}
            for name in dict.fromkeys(tables[:1] + tables[1 - LISTED_TABLES :])
        ]
        self._spool.append([{"kind": "tag", "key": "mlflow.loggedArtifacts", "value": json.dumps(listed)}])

    def log_evaluations(self, results: Sequence[Evaluation]) -> None:
        """Keep one version's per-prompt scores and samples, and log the mean of each metric."""
        folder = write_evaluations(self._rundir.evaluations, results)
        self._file(folder, "evaluations")
        means = {
            f"eval/{result.task}/{metric}": float(scores.mean())
            for result in results for metric, scores in result.scores.items()
        }  # fmt: skip
        self._append_metrics(results[0].version, means)

    def evaluations(self, up_to: int) -> Mapping[int, Sequence[Evaluation]]:
        """Return what earlier incarnations evaluated, by version, without what lies beyond `up_to`."""
        return {v: results for v, results in read_evaluations(self._rundir.evaluations).items() if v <= up_to}

    def log_figure(self, path: Path) -> None:
        """Keep a picture that lies in the run directory."""
        self._file(path, "figures")

    def log_report(self, path: Path) -> None:
        """Keep a page about the run that lies in its directory."""
        self._file(path, "report")

    def log_final(self, path: Path) -> None:
        """Keep what was evaluated when training ended, under a name that enters no curve."""
        self._file(path, "final")

    def log_checkpoint(self, path: Path, version: int, **tags: str) -> None:
        """Register a checkpoint where it lies; nothing is copied."""
        self._files.append([{
            "kind": "model", "name": path.name, "timestamp": self._files.now(),
            "tags": {"path": str(path.resolve()), "version": str(version), **tags},
        }])  # fmt: skip

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", deadline_s: float = FLUSH_S) -> None:
        """End the run with a status, deliver what can be delivered, and say what remains; the first call counts."""
        if self._finished.is_set():
            return
        self._finished.set()
        self._status(status)
        end = time.monotonic() + deadline_s
        remaining = sum(spool.close(max(end - time.monotonic(), 0.0)) for spool in (self._spool, self._files))
        if remaining:
            log.warning(
                "tracking: %d records are not at %s yet; they are kept in %s and are sent when the run is opened again",
                remaining,
                self._outages.destination,
                self._rundir.path,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        if interrupted:
            self.finish("KILLED", INTERRUPTED_S)
        self.finish("FAILED" if kind else "FINISHED")

    def _status(self, status: str) -> None:
        self._spool.append([{"kind": "status", "value": status, "timestamp": self._spool.now()}])

    def _append_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        now = self._spool.now()
        self._spool.append(
            {
                "kind": "metric", "key": metric_key(key), "value": float(value), "step": version, "timestamp": now,
                "incarnation": self._incarnation,
            }
            for key, value in metrics.items()
        )  # fmt: skip

    def _file(self, path: Path, folder: str) -> None:
        relative = path.resolve().relative_to(self._rundir.path.resolve()).as_posix()
        self._files.append([{"kind": "artifact", "path": relative, "folder": folder, "timestamp": self._files.now()}])

    def _log_config(self, recipe: Recipe) -> None:
        config: dict[str, Any] = masked(recipe.model_dump(mode="json"))
        self._spool.append(
            {
                "kind": "param",
                "key": metric_key(key),
                "value": short(value if isinstance(value, str) else json.dumps(value)),
            }
            for key, value in flatten(config).items()
        )
        # What is evaluated after the curves changes nothing in how they compare.
        hashed = config | {"evaluation": {key: of for key, of in config["evaluation"].items() if key != "final"}}
        hashes = {f"config.{group}": content_hash(hashed[group])[:12] for group in HASHED_GROUPS}
        self.log_tags({**hashes, **git_tags(), **config["tracking"]["tags"]})
        self.log_tags({"headroom.dir": str(self._rundir.path.resolve())})
        path = self._rundir.path / "config.json"
        write_atomic(path, json.dumps(config, indent=2) + "\n")
        self._file(path, "config")

    def _watch_node(self) -> None:
        monitor = NodeMonitor()
        while not self._finished.wait(SYSTEM_METRICS_S):
            self.log_node("driver", monitor.sample())


class NodeMonitor:
    """Samples the machine it is on: CPU, memory, disk, network, and NVIDIA GPUs where pynvml finds some."""

    def __init__(self) -> None:
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self._monitors.append(GPUMonitor())
        except (ImportError, RuntimeError):
            pass  # no GPU to watch

    def sample(self) -> dict[str, float]:
        """Return the current values by MLflow's names."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        return values


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return a metric of any run as (policy version, value), without what a resume rolled back."""
    client = mlflow.MlflowClient(uri)
    starts = [(m.step, m.timestamp) for m in client.get_metric_history(run_id, INCARNATION)]
    return surviving(((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key)), starts)


def metric_key(key: str) -> str:
    """Replace what MLflow refuses in names."""
    return re.sub(r"[^\w\-. :/]", "_", re.sub("/{2,}", "/", key))


def _problem(error: Exception) -> str:
    text = str(error)
    if "Max retries exceeded" in text or "Connection" in type(error).__name__:
        return "is not reachable"
    first_line = text.partition("\n")[0]
    return f"takes no records now ({type(error).__name__}: {printable_uri(short(first_line, 160))})"


def git_tags() -> dict[str, str]:
    """The commit of this checkout and whether it was changed; nothing where there is no git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = str(bool(git("status", "--porcelain")))
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.changed": changed}
    except (OSError, subprocess.CalledProcessError):
        return {}
