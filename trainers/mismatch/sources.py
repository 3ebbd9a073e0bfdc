"""Series from a plain table, and evaluations from a run's per-prompt records."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.errors import UserError
from trainers.mismatch.series import Curve, Series, from_means, from_scores
from trainers.types import Evaluation

Table = Mapping[str, Sequence[Any]]
SHOWN = 40  # characters of a cell
LARGEST_VERSION = 2**53  # a float holds every whole number up to it


def from_table(
    table: Table, *, evaluations: Sequence[str], reward: str = "reward", kl: str | None = None, version: str = "version"
) -> Series:
    """Build a series from columns of equal length, one row a version, rows in order of version.

    Column `<name>_se`, where there is one, is the standard error of `<name>`, in its unit. A cell may be a list:
    the scores of the same prompts at every version, None where undefined; they are paired (`from_scores`). A cell that
    is None or empty text was not measured; a number may be given as text. The first of `evaluations` is the primary
    one. Raises UserError for an unknown column, a cell that is no number, NaN, versions that repeat or are out of
    order, a value without its standard error, lists of unequal length, or no evaluation at all.
    """
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"the columns differ in length: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
    versions = [_version(cell, row) for row, cell in enumerate(_column(table, version))]
    for before, after in zip(versions[:-1], versions[1:], strict=True):
        if after <= before:
            what = "twice" if after == before else f"after version {before}"
            raise UserError(f"column {version} has version {after} {what}: give one row a version, in order")
    return Series(
        reward=_curve(table, reward, versions),
        kl=None if kl is None else _curve(table, kl, versions),
        evaluations=tuple(_curve(table, name, versions) for name in evaluations),
    )


def from_records(
    records: Mapping[int, Sequence[Evaluation]], *, reward: Curve, kl: Curve | None = None, primary: str | None = None
) -> Series:
    """Build a series from what `trainers.records.read_evaluations` returns, reward and KL beside it.

    Each metric of each task is an evaluation `<task>/<metric>` of per-prompt scores, paired between versions; prompts
    with the same uid are one cluster. `primary` goes first. Raises UserError if there is none, if `primary` is
    not among them, or if a task's prompts differ between versions.
    """
    found: dict[tuple[str, str], dict[int, Evaluation]] = {}
    for number, of_version in sorted(records.items()):
        for evaluation in of_version:
            for metric in evaluation.scores:
                found.setdefault((evaluation.task, metric), {})[number] = evaluation
    names = {f"{task}/{metric}": (task, metric) for task, metric in found}
    if primary is not None and primary not in names:
        raise UserError(f"evaluation {primary} is not in the records: they have {', '.join(names) or 'none'}")
    order = sorted(names, key=lambda name: name != primary)
    curves = tuple(_paired(name, names[name][1], found[names[name]]) for name in order)
    return Series(reward=reward, kl=kl, evaluations=curves)


def _paired(name: str, metric: str, by_version: Mapping[int, Evaluation]) -> Curve:
    versions = list(by_version)
    uids = by_version[versions[0]].prompt_uids
    for number, evaluation in by_version.items():
        if evaluation.prompt_uids != uids:
            shared = len(set(uids) & set(evaluation.prompt_uids))
            raise UserError(
                f"{name}: versions {versions[0]} and {number} were evaluated on different prompts "
                f"({shared} of {len(uids)} shared): evaluate every version on the same ones"
            )
    scores = np.stack([by_version[number].scores[metric].astype(np.float64) for number in versions])
    return from_scores(name, versions, scores, clusters=np.array(uids))


def is_scores(cell: Any) -> bool:
    """Whether a cell holds per-prompt scores rather than one number."""
    return isinstance(cell, list | tuple | np.ndarray)


def _scored(name: str, column: Sequence[Any], versions: Sequence[int]) -> Curve:
    measured = [(at, cell) for at, cell in zip(versions, column, strict=True) if not _missing(cell)]
    first, length = measured[0][0], len(measured[0][1]) if is_scores(measured[0][1]) else 0
    for at, cell in measured:
        if not is_scores(cell) or not len(cell):
            raise UserError(
                f"{name} is {repr(cell)[:SHOWN]} at version {at}: it must be a list of scores, as at other versions"
            )
        if len(cell) != length:
            raise UserError(
                f"{name} has {length} scores at version {first} and {len(cell)} at version {at}: "
                "score the same prompts at every version, null where a score is undefined"
            )
    scores = [[_number(score, f"score {i} of {name}", at) for i, score in enumerate(cell, 1)] for at, cell in measured]
    return from_scores(name, [at for at, _ in measured], np.array(scores, np.float64))


def _curve(table: Table, name: str, versions: Sequence[int]) -> Curve:
    if any(is_scores(cell) for cell in _column(table, name)):
        return _scored(name, _column(table, name), versions)
    cells = [_number(cell, name, at) for cell, at in zip(_column(table, name), versions, strict=True)]
    measured = [row for row, cell in enumerate(cells) if cell is not None]
    at = [versions[row] for row in measured]
    means = [cell for cell in cells if cell is not None]
    if f"{name}_se" not in table:
        return from_means(name, at, means, None)
    errors = []
    for row in measured:
        error = _number(table[f"{name}_se"][row], f"{name}_se", versions[row])
        if error is None:
            raise UserError(f"version {versions[row]} has {name} but no {name}_se: give it, or drop that column")
        errors.append(error)
    return from_means(name, at, means, errors)


def _column(table: Table, name: str) -> Sequence[Any]:
    if name not in table:
        raise UserError(f"there is no column {name}: the columns are {', '.join(table) or 'none'}")
    return table[name]


def _missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _version(cell: Any, row: int) -> int:
    try:
        number = math.nan if _missing(cell) else float(cell)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number.is_integer() or abs(number) > LARGEST_VERSION:
        raise UserError(
            f"row {row + 1}: {repr(cell)[:SHOWN]} is no policy version: it must be a whole number, at most 2^53"
        )
    return int(number)


def _number(cell: Any, name: str, version: int) -> float | None:
    if _missing(cell):
        return None
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        said = repr(cell)[:SHOWN]
        raise UserError(f"{name} is {said} at version {version}: it must be a number, or empty") from None
    if not math.isfinite(number):
        raise UserError(f"{name} is {number} at version {version}: leave the cell empty if it was not measured")
    return number
