"""What the instrument reads: reward, KL and evaluations of the same policy versions, with their measurement errors.

Shapes: n measured versions of one quantity, N prompts. A version at which a quantity was not measured is
absent from its curve; nothing is filled in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

LARGEST, SMALLEST = 1e100, 1e-100  # sizes whose squares a float holds with room to spare
MOST_MEASURED = 5_000  # versions with standard errors: their covariance is a matrix
MOST_EVALUATED = 1_000  # the same for an evaluation: the time that the alarm takes grows with the square
ENOUGH_DEFINED = 0.5  # a version at which fewer of the prompts have a score counts as not measured


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """One quantity at the n versions where it was measured, in its own unit; more is better.

    Raises UserError for versions that repeat or are out of order, for numbers that are not finite, and for a curve
    whose largest number or standard error is beyond 1e-100 to 1e100.
    """

    name: str
    versions: Integers  # (n,) increasing
    mean: Array  # (n,)
    covariance: Array | None  # (n, n) of the errors of `mean`; None: their size is not known
    prompts: int | None = None  # independent prompts (clusters) behind the covariance
    notes: tuple[str, ...] = ()  # what was left out, and why

    def __post_init__(self) -> None:
        _check_versions(self.name, self.versions)
        _check_finite(self.name, self.versions, self.mean)
        _check_size(self.name, self.versions, self.mean)
        if self.covariance is None:
            return
        if self.covariance.shape != (len(self.versions),) * 2:
            raise ValueError(f"{self.name}: covariance {self.covariance.shape} of {len(self.versions)} versions")
        _check_finite(f"the standard error of {self.name}", self.versions, np.diag(self.covariance))

    @property
    def se(self) -> Array | None:
        """Standard errors (n,), in the unit of the quantity."""
        return None if self.covariance is None else np.sqrt(np.diag(self.covariance))

    def at(self, versions: Integers) -> "Curve":
        """Return the part at `versions`. Raises ValueError where one was not measured."""
        places = np.searchsorted(self.versions, versions)
        if len(versions) and (places.max() >= len(self.versions) or np.any(self.versions[places] != versions)):
            raise ValueError(f"{self.name} was not measured at all of {versions.tolist()}")
        covariance = None if self.covariance is None else self.covariance[np.ix_(places, places)]
        return Curve(
            name=self.name,
            versions=versions,
            mean=self.mean[places],
            covariance=covariance,
            prompts=self.prompts,
            notes=self.notes,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """One run: the proxy reward, optionally the KL to the reference, and at least one evaluation.

    The first evaluation is the primary one. Raises UserError if there is none, if two share a name, or if one has
    standard errors at more than 1,000 versions.
    """

    reward: Curve
    evaluations: tuple[Curve, ...]
    kl: Curve | None = None

    def __post_init__(self) -> None:
        names = [curve.name for curve in self.evaluations]
        if not any(len(curve.versions) for curve in self.evaluations):
            raise UserError(
                f"no evaluations: {', '.join(names) or 'none was named'}; nothing to compare the reward with"
            )
        if len(set(names)) < len(names):
            raise UserError(f"two evaluations have the same name: {', '.join(names)}")
        for curve in self.evaluations:
            if curve.covariance is not None:
                _check_count(curve.name, len(curve.versions), MOST_EVALUATED)

    @property
    def primary(self) -> Curve:
        """The evaluation that the stated false-alarm rate is about."""
        return self.evaluations[0]


def from_means(name: str, versions: Sequence[int], mean: Sequence[float], se: Sequence[float] | None) -> Curve:
    """Build a curve of independent means (n,) with standard errors (n,), both in the quantity's unit.

    `se` None: not known. Raises UserError as Curve does, for a standard error that is not positive, and for standard
    errors at more than 5,000 versions.
    """
    numbers = np.asarray(versions, np.int64)
    if se is None:
        return Curve(name=name, versions=numbers, mean=np.asarray(mean, np.float64), covariance=None)
    errors = np.asarray(se, np.float64)
    _check_count(name, len(numbers), MOST_MEASURED)
    _check_finite(f"the standard error of {name}", numbers, errors)
    if np.any(errors <= 0):
        version = numbers[np.argmax(errors <= 0)]
        raise UserError(f"the standard error of {name} is not positive at version {version}")
    _check_size(f"the standard error of {name}", numbers, errors)
    return Curve(name=name, versions=numbers, mean=np.asarray(mean, np.float64), covariance=np.diag(errors**2))


def from_scores(
    name: str, versions: Sequence[int], scores: Array, clusters: Sequence[object] | NDArray[np.generic] | None = None
) -> Curve:
    """Build a curve from scores (n, N) of the same N prompts at n versions, paired between the versions.

    The mean over prompts and the covariance of its errors between versions, clustered by `clusters` (N,), by default
    by prompt: the sandwich of Liang & Zeger 1986 for means, times G / (G - 1) for G clusters, so that for one score a
    prompt it is the sample covariance over N. An undefined score is NaN: a version at which fewer than half of the
    prompts are defined counts as not measured, and the other versions are compared on the prompts defined at all of
    them; both are noted. Raises UserError as Curve does, when fewer than two clusters are left, and for more than 5,000
    versions.
    """
    numbers = np.asarray(versions, np.int64)
    _check_count(name, len(numbers), MOST_MEASURED)
    _check_versions(name, numbers)
    if np.any(np.isinf(scores)):
        raise UserError(f"{name} has an infinite score at version {numbers[np.argmax(np.isinf(scores).any(1))]}")
    _check_size(f"a score of {name}", numbers, np.abs(np.nan_to_num(scores)).max(1, initial=0))
    kept, columns, notes = complete(numbers, scores)
    labels = np.arange(scores.shape[1]) if clusters is None else np.asarray(clusters)
    groups, places = np.unique(labels[columns], return_inverse=True)
    if len(groups) < 2:
        raise UserError(f"{name}: {len(groups)} prompts have a score at every version; a standard error needs two")
    used = scores[np.ix_(kept, columns)].astype(np.float64)
    mean = used.mean(1)
    influence = np.zeros((len(groups), len(mean)))
    np.add.at(influence, places, ((used - mean[:, None]) / used.shape[1]).T)
    factor = len(groups) / (len(groups) - 1)
    return Curve(
        name=name,
        versions=numbers[kept],
        mean=mean,
        covariance=factor * influence.T @ influence,
        prompts=len(groups),
        notes=notes,
    )


def symmetric_root(covariance: Array) -> Array:
    """Return the symmetric square root (n, n) of a covariance (n, n): unique, also where the covariance is singular.

    What rounding has made negative of its eigenvalues counts as 0.
    """
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def complete(versions: Integers, scores: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_], tuple[str, ...]]:
    """Choose among scores (n, N) the versions (n,) and prompts (N,) so that none is missing; and say what was left out.

    A version at which fewer than half of the prompts are defined (not NaN) is left out, then each prompt that is not
    defined at all of the others.
    """
    defined = ~np.isnan(scores)
    kept = defined.mean(1) >= ENOUGH_DEFINED
    columns = defined[kept].all(0)
    notes = [f"version {version} left out: most of its scores are undefined" for version in versions[~kept]]
    if not columns.all():
        notes.append(f"{np.sum(~columns)} of {len(columns)} prompts left out: undefined at some version")
    return kept, columns, tuple(notes)


def _check_versions(name: str, versions: Integers) -> None:
    for before, after in zip(versions[:-1], versions[1:], strict=True):
        if before == after:
            raise UserError(f"{name} has version {after} twice: keep one row a version")
        if before > after:
            raise UserError(f"{name} has version {after} after version {before}: order the rows by version")


def _check_finite(name: str, versions: Integers, values: Array) -> None:
    if values.shape != versions.shape:
        raise ValueError(f"{name}: {values.shape} values at {versions.shape} versions")
    wrong = ~np.isfinite(values)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise UserError(
            f"{name} is {values[place]} at version {versions[place]}: leave out what was not measured, mend the rest"
        )


def _check_size(name: str, versions: Integers, values: Array) -> None:
    largest = float(np.abs(values).max(initial=0))
    if largest > LARGEST or 0 < largest < SMALLEST:
        place = int(np.argmax(np.abs(values)))
        raise UserError(
            f"{name} is {values[place]:g} at version {versions[place]}: nothing can be computed beyond {SMALLEST:g} to "
            f"{LARGEST:g}; give it in another unit"
        )


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        few = -(-count // most)
        raise UserError(f"{name} has standard errors at {count} versions, {most} at most: keep one row in {few}")
