"""Where runs lie: a table in a file, a run directory, or MLflow."""

import os
import re
from pathlib import Path

from configs.errors import UserError
from configs.rows import read_rows
from trainers import spool
from trainers.measured import Columns, Logged, MeasuredRun, choose, from_columns, from_headroom, recognise
from trainers.mismatch.sources import is_scores
from trainers.records import read_evaluations, read_final
from trainers.rundir import RunDir

MLFLOW = "mlflow:"


def read(source: str, columns: Columns | None = None, tracking_uri: str | None = None) -> MeasuredRun:
    """Read one run.

    `source` is a .csv, .jsonl, .jsonl.gz or .parquet file with one row a version, a Headroom run directory, or
    `mlflow:` and a run's id or name, or an experiment, whose newest run is meant. With `tracking_uri` (default:
    sqlite:///mlflow.db, as in the recipes) the prefix may be left out. In a file, column `<name>_se` is the standard
    error of `<name>`; a list of numbers holds per-prompt scores, of the same prompts at every version.

    Columns that are not named are found: the reward is `reward/mean` or `reward`, the KL `kl/reference` or `kl`, the
    version `version` or `step` (in MLflow the step). In a run of Headroom the evaluations are the recipe's primary one,
    then the others of which more is better; elsewhere those that begin with `eval/`, or else have standard errors or
    per-prompt scores; of these, TRL's `eval_rewards/…` if there are any. Raises UserError if there is no such source or
    column, no evaluation, or a number that cannot be used (see `trainers.mismatch.from_table`); InfraError if MLflow
    does not answer.
    """
    return _read(source, columns or Columns(), tracking_uri, newest=True)[0]


def read_all(source: str, columns: Columns | None = None, tracking_uri: str | None = None) -> tuple[MeasuredRun, ...]:
    """Read as `read` does, but all runs of an experiment and all of the same name, newest first."""
    return _read(source, columns or Columns(), tracking_uri, newest=False)


def _read(source: str, columns: Columns, uri: str | None, *, newest: bool) -> tuple[MeasuredRun, ...]:
    if not source.startswith(MLFLOW):
        if os.path.isdir(source):  # unlike Path's, these take no offence at a name that no file can have
            return (_run_directory(source, columns),)
        if os.path.isfile(source):
            return (_file(source, columns),)
        if uri is None:
            raise UserError(f"{source}: no such file or run directory; a run in MLflow is written mlflow:RUN")
    from trainers import tracked  # noqa: PLC0415  # mlflow is slow to import

    store = tracked.Store(uri or tracked.DEFAULT_URI)
    reference = source.removeprefix(MLFLOW)
    runs = (store.one(reference),) if newest else store.find(reference)
    return tuple(tracked.measured(store, run, columns) for run in runs)


def _file(source: str, columns: Columns) -> MeasuredRun:
    rows = [row for _, row in read_rows(source)]
    names = list(dict.fromkeys(key for row in rows for key in row))
    if len(names) == 1 and re.search(r"[;|\t]", names[0]):
        raise UserError(f"{source}: one column, {names[0]!r}: separate the columns by commas")
    if strange := [name for name in names if not name.isprintable()]:
        raise UserError(f"{source}: column {strange[0]!r} has a name that cannot be shown: rename it")
    table = {name: [row.get(name) for row in rows] for name in names}
    with_scores = [name for name, cells in table.items() if any(map(is_scores, cells))]
    chosen = choose(columns, names, recognise(names, with_scores), source)
    return from_columns(Path(source).name.partition(".")[0], source, table, columns, chosen)


def _run_directory(source: str, columns: Columns) -> MeasuredRun:
    rundir = RunDir(Path(source))
    if not os.path.isfile(rundir.metrics):
        raise UserError(f"{source}: no run directory: it has no {rundir.metrics.name}")
    try:
        logged = _logged(rundir)
    except OSError as error:
        raise UserError(f"{source}: {error.filename} cannot be read: {error.strerror}") from error
    return from_headroom(logged.params.get("run.name", rundir.path.name), source, logged, columns)


def _logged(rundir: RunDir) -> Logged:
    texts: dict[str, dict[str, str]] = {"param": {}, "tag": {}}
    for record in spool.read(rundir.metrics):
        if record["kind"] in texts:
            texts[record["kind"]][record["key"]] = record["value"]
    try:
        records, final = read_evaluations(rundir.evaluations), read_final(rundir.final)
    except UserError as error:
        raise UserError(f"{rundir.path}: {error}") from error
    metrics = spool.read_metrics(rundir.metrics)
    return Logged(params=texts["param"], tags=texts["tag"], metrics=metrics, records=records, final=final)
