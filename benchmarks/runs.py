"""The simulated runs of benchmarks.instrument: truths, and errors around them. Unit: one stated standard error."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from trainers.mismatch.alarm import MARGIN_SE
from trainers.mismatch.series import Array, Integers

Errors = Callable[[np.random.Generator, int, int], Array]
Shape = Callable[[Array], Array]  # of time since the peak; -1 at 3 evaluations after it

DROPS = (4, 5, 6)
WITHIN = 3  # evaluations in which a fall falls by its drop, and is to be found
WALK = 0.5  # standard deviation of a random walk's steps
MISSING = 5  # one evaluation of so many is
PROMPT_CORRELATION = 0.7  # of one prompt's scores at two versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A truth (K,), the errors around it, and the peak of the truth, if it falls."""

    name: str
    truth: Array
    errors: Errors
    peak: int | None = None
    shape: Shape | None = None  # of a fall that drops within 3 evaluations
    within_margin: bool = False  # the truth falls, by no more than the default margin
    to_the_end: bool = False  # the fall may be found until the run ends
    versions: Integers | None = None  # (K,) where some are missing
    planned: int | None = None  # evaluations, the missing ones included


def independent(sd: float) -> Errors:
    """Errors of standard deviation `sd`, stated as 1."""
    return lambda rng, points, runs: sd * rng.standard_normal((points, runs))


def autoregressive(correlation: float) -> Errors:
    """Errors of standard deviation 1 whose neighbours correlate."""

    def errors(rng: np.random.Generator, points: int, runs: int) -> Array:
        out = rng.standard_normal((points, runs))
        for point in range(1, points):
            out[point] = correlation * out[point - 1] + np.sqrt(1 - correlation**2) * out[point]
        return out

    return errors


def heavy(rng: np.random.Generator, points: int, runs: int) -> Array:
    """Errors of Student's t with 4 degrees of freedom, standard deviation 1."""
    return np.asarray(rng.standard_t(4, (points, runs)) / np.sqrt(2))


def walking(rng: np.random.Generator, points: int, runs: int, room: float) -> Array:
    """A random walk that is kept within `room` of its best so far."""
    path = np.zeros((points, runs))
    best = np.zeros(runs)
    for point in range(1, points):
        path[point] = np.maximum(path[point - 1] + WALK * rng.standard_normal(runs), best - room)
        best = np.maximum(best, path[point])
    return path


def walk(room: float) -> Errors:
    """Errors of standard deviation 1 around a random walk as above."""
    return lambda rng, points, runs: walking(rng, points, runs, room) + rng.standard_normal((points, runs))


def paired(rng: np.random.Generator, points: int, runs: int) -> Array:
    """Errors of standard deviation 1; where scores are simulated, they bring their own."""
    return rng.standard_normal((points, runs))


def measured_scores(rng: np.random.Generator, truth: Array, prompts: int) -> Array:
    """Scores (K, N) of the same prompts around truth (K,), which counts effective standard errors of their means."""
    shared = np.sqrt(PROMPT_CORRELATION) * rng.standard_normal(prompts)
    alone = np.sqrt(1 - PROMPT_CORRELATION)
    effective = alone / np.sqrt(prompts)
    return np.asarray(effective * truth[:, None] + shared + alone * rng.standard_normal((len(truth), prompts)))


def near_ceiling(rng: np.random.Generator, points: int, prompts: int) -> Array:
    """Right answers (K, N) to prompts of different difficulty, 97 % of them right."""
    right = rng.beta(9.7, 0.3, prompts)
    return (rng.random((points, prompts)) < right).astype(np.float64)


def kink(time: Array) -> Array:
    """Rise, and fall three times as fast."""
    return np.where(time < 0, time / 9, -time / WITHIN)


def quadratic(time: Array) -> Array:
    """A parabola."""
    return -((time / WITHIN) ** 2)


def cliff(time: Array) -> Array:
    """One step."""
    return np.where(time > 0, -1.0, 0.0)


def hump(time: Array) -> Array:
    """A bell: it falls fast, then levels out."""
    return (np.exp(-((time / WITHIN) ** 2)) - 1) / (1 - np.exp(-1))


def plateau_then_quadratic(time: Array) -> Array:
    """Nothing, then a fall that grows."""
    return -((np.maximum(time, 0) / WITHIN) ** 2)


SHAPES: dict[str, Shape] = {
    "kink": kink,
    "quadratic": quadratic,
    "cliff": cliff,
    "hump": hump,
    "plateau then quadratic": plateau_then_quadratic,
}


def cells(points: int) -> Iterator[Cell]:
    """Yield the null families and the falls for `points` evaluated versions."""
    yield from nulls(points)
    time = np.arange(points, dtype=np.float64)
    for where, peak in (("first", 0), ("second", 1), ("middle", points // 2), ("late", points - 1 - WITHIN)):
        for drop in DROPS:
            for name, shape in SHAPES.items():
                yield Cell(
                    name=f"{name} {where} drop {drop}",
                    truth=drop * shape(time - peak),
                    errors=independent(1.0),
                    peak=peak,
                    shape=shape,
                )
    yield Cell(name="null kink, peak at the last", truth=kink(time - points + 1) * 6, errors=independent(1.0))
    third = points // 3
    drift = -6 * np.maximum(time - third, 0) / (points - 1 - third)
    yield Cell(name="slow drift by 6 to the end", truth=drift, errors=independent(1.0), peak=third, to_the_end=True)
    yield missing(points)


def missing(points: int) -> Cell:
    """A quadratic fall of 6 of which every fifth evaluation was not measured; the peak was."""
    time = np.arange(points)
    kept = time[time % MISSING != (points // 2 + 2) % MISSING]
    return Cell(
        name="quadratic middle drop 6, each 5th missing",
        truth=6 * quadratic(kept - float(points // 2)),
        errors=independent(1.0),
        peak=int(np.sum(kept < points // 2)),
        versions=kept,
        planned=points,
    )


def nulls(points: int) -> Iterator[Cell]:
    """Yield the families in which nothing falls, or by no more than the default margin."""
    time, right = np.arange(points, dtype=np.float64), independent(1.0)
    flat, third = np.zeros(points), points // 3
    two_stages = 2.0 * np.minimum(time, points // 4) + 2.0 * np.maximum(time - points // 2, 0)
    dip = np.where((time >= third) & (time < third + 3), -MARGIN_SE, 0.0)
    yield Cell(name="null flat", truth=flat, errors=right)
    yield Cell(name="null slow rise", truth=0.3 * time, errors=right)
    yield Cell(name="null plateau", truth=2.0 * np.minimum(time, third), errors=right)
    yield Cell(name="null two-stage rise", truth=two_stages, errors=right)
    yield Cell(name="null dip by the margin and recovery", truth=dip, errors=right, within_margin=True)
    yield Cell(name="null random walk that never falls", truth=flat, errors=walk(0.0))
    yield Cell(name="null random walk within the margin", truth=flat, errors=walk(MARGIN_SE), within_margin=True)
    yield Cell(name="null heavy tails t(4)", truth=flat, errors=heavy)
    for factor in (1.1, 1.25):
        yield Cell(name=f"null SE understated {factor}", truth=flat, errors=independent(factor))
    for jitter in (0.25, 0.5, 1):
        errors = independent(float(np.sqrt(1 + jitter**2)))
        yield Cell(name=f"null jitter {jitter} SE", truth=flat, errors=errors)
    for correlation in (0.5, 0.6, 0.8):
        yield Cell(name=f"null AR(1) {correlation}", truth=flat, errors=autoregressive(correlation))
