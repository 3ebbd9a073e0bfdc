"""Runs of any trainer, found in MLflow and read back."""

import logging
import math
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _get_latest_schema_revision as latest_schema

from configs.errors import UserError
from trainers.measured import (
    EVALUATION_TAG,
    Columns,
    Logged,
    MeasuredRun,
    choose,
    early_columns,
    from_columns,
    from_headroom,
    recognise,
)
from trainers.records import read_evaluations, read_final
from trainers.redact import printable_uri, short
from trainers.spool import INCARNATION, surviving
from trainers.types import Evaluation, InfraError

DEFAULT_URI = "sqlite:///mlflow.db"  # the recipes' own
SQLITE, FILE = "sqlite:///", "file://"
MISTAKE = "INVALID_PARAMETER_VALUE"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", MISTAKE)  # the second: what cannot be an id at all
SHOWN_RUNS = 4
SETTINGS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # older runs lie in `mlruns`; nothing is written there
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What MLflow says about one run, metrics aside."""

    run_id: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    keys: tuple[str, ...]  # names of its metrics
    seconds: float | None  # from start to end; None: not ended


class Store:
    """One MLflow store or server, read only.

    Raises UserError if there is none at `uri`, InfraError if it does not answer or cannot be read; so does each method.
    """

    def __init__(self, uri: str) -> None:
        self._shown = printable_uri(uri)
        self._check_place(uri)
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        for noisy in ("mlflow.store.db.utils", "alembic"):  # what is wrong is said by the error, once
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        self._uri = uri
        self._client = self._ask(lambda: mlflow.MlflowClient(uri))

    def _check_place(self, uri: str) -> None:
        none = f"no MLflow store at {self._shown}"
        try:
            why = _not_readable(uri)
        except NotADirectoryError as error:
            raise UserError(f"{none}: a database is written {SQLITE}{error.filename}") from error
        except sqlite3.OperationalError as error:  # it is locked, for example
            raise InfraError(f"MLflow at {self._shown}: {error}") from error
        except (OSError, sqlite3.DatabaseError) as error:
            why = str(error) if isinstance(error, sqlite3.Error) else error.strerror
            raise UserError(f"{none} ({why}); give its address with --tracking-uri") from error
        if why:
            raise UserError(f"{none} {why}")

    def find(self, reference: str) -> tuple[TrackedRun, ...]:
        """Return the run with this id, else those with this name, else those of this experiment, newest first.

        Raises UserError, naming the experiments that there are, if it is none of them.
        """
        if run := self._ask(lambda: self._by_id(reference)):
            return (_tracked(run),)
        experiments = list(self._ask(self._client.search_experiments))
        quote = '"' if "'" in reference else "'"
        if quote not in reference:  # MLflow's language has no way to write both
            where = f"attributes.run_name = {quote}{reference}{quote}"
            if named := self._search([e.experiment_id for e in experiments], where):
                return named
        matching = [e.experiment_id for e in experiments if reference in (e.name, e.experiment_id)]
        if not matching:
            names = ", ".join(e.name for e in experiments) or "none"
            raise UserError(f"no run or experiment {reference} in MLflow at {self._shown}: its experiments are {names}")
        found = self._search(matching, "")
        if not found:
            raise UserError(f"experiment {reference} in MLflow at {self._shown} has no runs")
        return found

    def one(self, reference: str) -> TrackedRun:
        """Return the run that an id or name means, or an experiment's newest. Raises UserError if a name is shared."""
        found = self.find(reference)
        if len(found) > 1 and all(run.name == reference for run in found):
            ids = ", ".join(run.run_id for run in found[:SHOWN_RUNS]) + (", …" if len(found) > SHOWN_RUNS else "")
            raise UserError(f"{len(found)} runs are called {reference}: name one by its id: {ids}")
        return found[0]

    def history(self, run: TrackedRun, key: str) -> list[tuple[int, float]]:
        """Return a metric as (step, value), the last of each step, without what a resume rolled back."""
        starts = [(step, timestamp) for step, timestamp, _ in self._points(run, INCARNATION)]
        return surviving(self._points(run, key), starts)

    def evaluations(self, run: TrackedRun) -> dict[int, list[Evaluation]]:
        """Return the per-prompt records that a run of Headroom left as artifacts, by version.

        Raises UserError naming a record that is damaged.
        """
        return self._read(run, "evaluations", read_evaluations)

    def final(self, run: TrackedRun) -> dict[int, dict[str, dict[int, list[Evaluation]]]]:
        """Return what a run of Headroom evaluated when its training ended; see `trainers.records.read_final`.

        Raises UserError as `evaluations` does.
        """
        return self._read(run, "final", read_final)

    def _read(self, run: TrackedRun, folder: str, read: Callable[[Path], dict[int, T]]) -> dict[int, T]:
        if not self._ask(lambda: self._client.list_artifacts(run.run_id, folder)):
            return {}
        with tempfile.TemporaryDirectory() as directory:
            path = Path(self._ask(lambda: self._client.download_artifacts(run.run_id, folder, directory)))
            try:
                return read(path)
            except UserError as error:
                raise UserError(f"artifacts of run {run.run_id} in MLflow at {self._shown}: {error}") from error

    def _by_id(self, run_id: str) -> Run | None:
        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ABSENT:
                return None
            raise

    def _points(self, run: TrackedRun, key: str) -> list[tuple[int, int, float]]:
        if key not in run.keys:
            return []
        found = self._ask(lambda: self._client.get_metric_history(run.run_id, key))
        return [(metric.step, metric.timestamp, _value(metric.value)) for metric in found]

    def _search(self, experiments: list[str], where: str) -> tuple[TrackedRun, ...]:
        order = ["attributes.start_time DESC"]
        return tuple(map(_tracked, self._ask(lambda: self._client.search_runs(experiments, where, order_by=order))))

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except ImportError as error:
            raise UserError(f"MLflow at {self._shown}: {error}; install what reads such a place") from error
        except Exception as error:  # of MLflow, or as they come from whatever keeps its data: databases, clouds, disks
            said = (str(error) or type(error).__name__).splitlines()[0]
            mistake = isinstance(error, MlflowException) and error.error_code == MISTAKE
            kind = UserError if mistake else InfraError
            raise kind(f"MLflow at {self._shown}: {printable_uri(short(said, 200))}") from error


def _not_readable(uri: str) -> str | None:
    """Return why MLflow would not just read a local place, but make a store there or bring its tables up to date.

    Raises OSError and sqlite3.Error for what cannot be opened.
    """
    place = Path(uri.removeprefix(SQLITE).removeprefix(FILE).partition("?")[0])
    nothing = "(it holds no experiments); give its address with --tracking-uri"
    if uri.startswith(SQLITE):
        place.open("rb").close()  # it tells what is wrong where SQLite does not
        with closing(sqlite3.connect(f"{place.resolve().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if not {"experiments", "alembic_version"} <= tables:
                return nothing
            if database.execute("SELECT version_num FROM alembic_version").fetchone() == (latest_schema(),):
                return None
        return "that this version of MLflow can read: upgrade a copy with `mlflow db upgrade`, which changes it"
    if uri.startswith(FILE) or "://" not in uri:
        return None if any((directory / "meta.yaml").is_file() for directory in place.iterdir()) else nothing
    return None


def measured(store: Store, run: TrackedRun, columns: Columns) -> MeasuredRun:
    """Read one run: one of Headroom with its per-prompt records, any other as a table by step.

    Raises UserError and InfraError as `trainers.sources.read` does.
    """
    source = f"mlflow:{run.run_id}"
    keys = [key for key in run.keys if not key.startswith("system/")]
    if EVALUATION_TAG in run.tags:
        metrics = {key: store.history(run, key) for key in keys}
        kept = {version for key, points in metrics.items() if key.startswith("eval/") for version, _ in points}
        records = {version: found for version, found in store.evaluations(run).items() if version in kept}
        logged = Logged(params=run.params, tags=run.tags, metrics=metrics, records=records, final=store.final(run))
        return from_headroom(run.name, source, logged, columns)
    names = ["step", *keys]
    chosen = choose(replace(columns, version=columns.version or "step"), names, recognise(names), source)
    curves = [chosen.reward, chosen.kl, *chosen.evaluations]
    needed = {chosen.version, *curves, *(f"{name}_se" for name in curves), *early_columns(names)}
    histories = {key: dict(store.history(run, key)) for key in keys if key in needed}
    steps = sorted({step for points in histories.values() for step in points})
    table: dict[str, Sequence[float | None]] = {
        "step": steps,
        **{key: [points.get(step) for step in steps] for key, points in histories.items()},
    }
    found = from_columns(run.name, source, table, columns, chosen)
    return replace(found, params=run.params, seconds=run.seconds)


def _value(value: float) -> float:
    """Undo what MLflow makes of infinity."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def _tracked(run: Run) -> TrackedRun:
    start, end = run.info.start_time, run.info.end_time
    return TrackedRun(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        params=run.data.params,
        tags=run.data.tags,
        keys=tuple(run.data.metrics),
        seconds=(end - start) / 1000 if start and end else None,
    )
