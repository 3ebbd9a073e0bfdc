"""What a run can still gain under this proxy and recipe, and where its evaluation goes next, as far as its curve tells.

The estimands are values of the *true* curve; measured values scatter around it. Paths are drawn by
`trainers.mismatch.paths`. Where the draws disagree by more than twice what the curve has moved so far, nothing or only
one side is said: before its peak a curve tells little about what follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from configs.errors import UserError
from trainers.mismatch import paths
from trainers.mismatch.series import Array, Curve, Integers, Series

Answer = Literal["interval", "at least", "at most", "not identified"]
ANSWERS: dict[tuple[bool, bool], Answer] = {  # by whether there is a lower and an upper side
    (True, True): "interval",
    (True, False): "at least",
    (False, True): "at most",
    (False, False): "not identified",
}

CORE = 0.8  # the share of draws whose width decides whether a forecast is identified
WIDE = 2.0  # times what the curve has moved so far: wider is not identified
FEWEST_PROMPTS = 6  # behind a covariance: of fewer, standard errors are too unsure for intervals
GRID = 60  # future evaluations that are drawn, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """What the primary evaluation can still gain within a budget, in its unit; see `headroom_within`."""

    evaluation: str
    estimand: str
    answer: Answer
    low: float | None  # None: nothing is said on this side, see reason
    high: float | None
    level: float
    smooth_low: float | None  # the same without surprises: breaks that no curve announces
    smooth_high: float | None
    weights: tuple[tuple[str, float], ...]  # of the models; none: not enough
    laws: tuple[paths.Law, ...]  # each law alone, without the doubt which one holds
    axis: str  # what the laws were fitted against
    reason: str | None  # why a side is missing
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """The true value of an evaluation some evaluations ahead, in its unit; see `forecast`."""

    evaluation: str
    estimand: str
    ahead: int
    version: int
    median: float | None
    low: float | None
    high: float | None
    level: float
    smooth_low: float | None  # the same without surprises: breaks that no curve announces
    smooth_high: float | None
    draws: Array  # (S,) sorted, without surprises; empty: not identified
    persistence: tuple[float, float] | None  # the baseline: last measured value and its standard error
    not_identified: str | None  # why nothing is said


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gains:
    """What R runs can still gain, in the evaluation's unit, before it is asked what of it is worth saying."""

    low: Array  # (R,)
    high: Array
    smooth: tuple[Array, Array]  # the same without surprises: breaks that no curve announces
    moved: Array  # (R,) what the curve has moved so far
    weights: dict[str, Array]  # by model (R,)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlook:
    """Forecasts of R runs at m evaluations to come, in the evaluation's unit."""

    draws: Array  # (R, m, S) sorted, without surprises
    surprised: Array  # (R, m, S) sorted, with them
    low: Array  # (R, m)
    high: Array
    smooth: tuple[Array, Array]  # the same without surprises: breaks that no curve announces
    identified: NDArray[np.bool_]  # (R, m)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measured:
    """The primary evaluation at the n versions that have a distance from the base."""

    curve: Curve
    distance: Array  # (n,)
    axis: str
    notes: tuple[str, ...]


def headroom_within(
    series: Series,
    *,
    kl: float | None = None,
    version: int | None = None,
    level: float = 0.95,
    draws: int = 2_000,
    seed: int = 0,
) -> Headroom:
    """Say how much more of the primary evaluation can be reached within a budget of `kl` (nats) or up to `version`.

    The estimand: the largest true value at the evaluations from now to the budget, at their cadence so far, less the
    largest at the versions evaluated so far; 0 if it is negative. "interval" gives both sides. "at most": no gain at
    all cannot be excluded. "at least": the upper side is more than twice what the curve has moved so far, which it
    does not support. "not identified": both. Raises UserError unless exactly one budget is given.
    """
    if (kl is None) == (version is None):
        raise UserError("give one budget: kl in nats, or version")
    measured = _measured(series)
    curve = measured.curve
    budget = f"a KL of {kl:g}" if kl is not None else f"version {version}"
    estimand = (
        f"the most of the true {curve.name} at evaluations up to {budget}, under this proxy and recipe, "
        "less the most at the versions evaluated so far"
    )
    reason = _not_enough(measured) or _no_future(measured, kl, version)
    if reason:
        return _nothing(measured, estimand, level, reason)
    seen = _standardised(measured)
    x, steps = _to_budget(measured, seen, kl, version)
    found = gains(seen, x, steps, level=level, draws=draws, seed=seed)
    low, high, smooth_low, smooth_high = (float(one[0]) for one in (found.low, found.high, *found.smooth))
    answer = answers(found.low, found.high, found.moved)[0]
    return Headroom(
        evaluation=curve.name,
        estimand=estimand,
        answer=answer,
        low=low if answer in ("interval", "at least") else None,
        high=high if answer in ("interval", "at most") else None,
        level=level,
        smooth_low=smooth_low,
        smooth_high=smooth_high,
        weights=tuple((name, float(weight[0])) for name, weight in found.weights.items()),
        laws=_laws(measured),
        axis=measured.axis,
        reason=_why(answer),
        notes=measured.notes,
    )


def gains(seen: paths.Seen, x: Array, steps: Array, *, level: float, draws: int, seed: int) -> Gains:
    """Return what R runs can still gain at the evaluations `steps` (m,) after the last, at distances `x` (k, m)."""
    drawn = paths.draw_paths(seen, x, steps, draws, seed)
    best = drawn.seen.max(2)
    ahead, smooth = (np.maximum(values.max(2) - best, 0) for values in (drawn.ahead, drawn.smooth))
    low, high = _quantiles(ahead, level)
    return Gains(
        low=low, high=high, smooth=_quantiles(smooth, level), moved=seen.swing * seen.unit, weights=drawn.weights
    )


def forecast(
    series: Series,
    ahead: Sequence[int] = (1, 3, 5),
    *,
    level: float = 0.95,
    draws: int = 2_000,
    seed: int = 0,
) -> tuple[Forecast, ...]:
    """Forecast the true primary evaluation at the versions `ahead` evaluations on, at their cadence so far.

    The interval of `level` contains breaks (a cliff, a second rise) that no curve announces; `smooth_low` and
    `smooth_high` do not. Nothing is said when the middle 80 % of the draws without such breaks are wider than twice
    what the curve has moved so far. Raises UserError for an `ahead` below 1.
    """
    if not ahead or min(ahead) < 1:
        raise UserError(f"ahead {list(ahead)} must be evaluations to come: 1 or more")
    measured = _measured(series)
    curve = measured.curve
    reason = _not_enough(measured)
    gap = float(np.median(np.diff(curve.versions))) if len(curve.versions) > 1 else 1.0
    found = None
    if reason is None:
        seen = _standardised(measured)
        steps = np.arange(1, max(ahead) + 1, dtype=np.float64)
        found = outlook(seen, onward(seen, steps), steps, level=level, draws=draws, seed=seed)
    out = []
    for horizon in ahead:
        why, values = reason, np.zeros(0)
        numbers: tuple[float | None, ...] = (None,) * 5
        if found is not None and not found.identified[0, horizon - 1]:
            why = f"{CORE:.0%} of the draws span more than twice what the curve has moved so far"
        elif found is not None:
            values = found.draws[0, horizon - 1]
            each = (found.low, found.high, *found.smooth)
            numbers = (float(np.median(values)), *(float(one[0, horizon - 1]) for one in each))
        at = round(float(curve.versions[-1]) + gap * horizon) if len(curve.versions) else 0
        out.append(_forecast(curve, horizon, at, numbers, values, level, why))
    return tuple(out)


def outlook(seen: paths.Seen, x: Array, steps: Array, *, level: float, draws: int, seed: int) -> Outlook:
    """Forecast R runs at the evaluations `steps` (m,) after the last, at distances `x` (k, m)."""
    drawn = paths.draw_paths(seen, x, steps, draws, seed)
    surprised, smooth = (np.sort(values.swapaxes(1, 2), axis=-1) for values in (drawn.ahead, drawn.smooth))
    low, high = _quantiles(surprised, level)
    core = np.diff(_quantiles(smooth, CORE), axis=0)[0]
    identified = core <= WIDE * (seen.swing * seen.unit)[:, None]
    return Outlook(
        draws=smooth,
        surprised=surprised,
        low=low,
        high=high,
        smooth=_quantiles(smooth, level),
        identified=identified,
    )


def crps(draws: Array, truth: Array | float) -> Array:
    """Continuous ranked probability score (...) of draws (..., S) against the truth (...); less is better.

    In their unit: E|X - y| - E|X - X'| / 2 over the draws as they are (Gneiting & Raftery 2007, eq. 21).
    """
    ordered, count = np.sort(draws, -1), draws.shape[-1]
    ranks = 2 * np.arange(1, count + 1) - count - 1
    off = np.abs(ordered - np.asarray(truth)[..., None]).mean(-1)
    return np.asarray(off - ordered @ ranks / count**2)


def crps_normal(mean: Array | float, sd: Array | float, truth: Array | float) -> Array:
    """Continuous ranked probability score of normal forecasts; its limit |mean - truth| for `sd` 0 (ibid., eq. 5)."""
    off, positive = np.asarray(truth) - mean, np.asarray(sd) > 0
    z = off / np.where(positive, sd, 1)
    score = sd * (z * (2 * special.ndtr(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    return np.asarray(np.where(positive, score, np.abs(off)))


def _measured(series: Series) -> _Measured:
    """Choose the axis: sqrt(KL) where enough evaluated versions have one, else versions since the first."""
    curve, notes = series.primary, list(series.primary.notes)
    axis = "versions since the first evaluated one, in place of sqrt(KL)"
    if series.kl is not None:
        joint: Integers = np.intersect1d(curve.versions, series.kl.versions)
        at = series.kl.at(joint).mean
        distance = np.sqrt(np.maximum(at, 0))
        if len(joint) >= paths.FEWEST and len(np.unique(distance)) >= 3:
            if len(joint) < len(curve.versions):
                notes.append(f"{len(curve.versions) - len(joint)} evaluated versions left out: no KL")
            if at.min() < 0:
                notes.append("negative KL estimates count as 0")
            return _Measured(curve=curve.at(joint), distance=distance, axis="sqrt(KL)", notes=tuple(notes))
        notes.append(
            f"KL not used: {len(joint)} evaluated versions have one, {paths.FEWEST} are needed, three of them different"
        )
    distance = (curve.versions - curve.versions[:1]).astype(np.float64)
    return _Measured(curve=curve, distance=distance, axis=axis, notes=tuple(notes))


def _not_enough(measured: _Measured) -> str | None:
    curve, points = measured.curve, len(measured.curve.versions)
    if points < paths.FEWEST:
        return f"not enough: {points} evaluated versions, {paths.FEWEST} are needed"
    if curve.covariance is None:
        return f"not enough: no standard error; give {curve.name}_se or per-prompt scores"
    if curve.prompts is not None and curve.prompts < FEWEST_PROMPTS:
        return f"not enough: {curve.prompts} prompts, a standard error needs {FEWEST_PROMPTS}"
    if not np.any(np.diag(curve.covariance) > 0):
        return "not enough: all prompts score the same at every version, so no standard error is known"
    if np.ptp(curve.mean) <= 1e-12 * np.max(np.abs(curve.mean)):
        return f"not enough: {curve.name} is constant"
    return None


def _no_future(measured: _Measured, kl: float | None, version: int | None) -> str | None:
    if version is not None:
        last = int(measured.curve.versions[-1])
        return None if version > last else f"the budget, version {version}, is spent: the last evaluated one is {last}"
    if measured.axis != "sqrt(KL)":
        raise UserError("a KL budget needs the KL at the evaluated versions: give it, or a version budget")
    last_kl = float(measured.distance[-1] ** 2)
    return None if kl is not None and kl > last_kl else f"the budget, a KL of {kl:g}, is spent: it is {last_kl:g} now"


def _standardised(measured: _Measured) -> paths.Seen:
    curve = measured.curve
    return paths.standardise(curve.mean[None], paths.errors_of(curve), curve.versions, measured.distance)


def _to_budget(measured: _Measured, seen: paths.Seen, kl: float | None, version: int | None) -> tuple[Array, Array]:
    """Return x (k, m) and steps (m,) of the evaluations from now to the budget."""
    if version is not None:
        gap = float(np.median(np.diff(measured.curve.versions)))
        far = (version - float(measured.curve.versions[-1])) / gap
        steps = _grid(far)
        return onward(seen, steps), steps
    assert kl is not None
    rates = _rates(seen)
    rate = float(np.median(rates)) or float(seen.x.max() / seen.steps[-1])
    steps = _grid((np.sqrt(kl) / seen.length - float(seen.x[-1])) / rate)
    return np.asarray(seen.x[-1] + rate * steps)[None], steps


def _grid(far: float) -> Array:
    """Evaluations to come at whole steps, at most GRID of them, and one at the budget, `far` steps away."""
    count = int(np.ceil(far))
    return np.asarray(np.append(np.arange(1.0, count), far) if count <= GRID else np.linspace(far / GRID, far, GRID))


def _rates(seen: paths.Seen) -> Array:
    """Return how fast x grew, a step, from each of the versions of the second half to the last; 0 where it fell."""
    first = len(seen.x) // 2
    rates = (seen.x[-1] - seen.x[first:-1]) / (seen.steps[-1] - seen.steps[first:-1])
    return np.asarray(np.maximum(rates, 0))


def onward(seen: paths.Seen, steps: Array) -> Array:
    """Return x (k, m), `steps` (m,) after the last version, at one of k rates that were seen."""
    rates = np.unique(np.round(np.quantile(_rates(seen), [1 / 6, 1 / 2, 5 / 6]), 9))
    return np.asarray(seen.x[-1] + rates[:, None] * steps)


def _quantiles(values: Array, level: float) -> tuple[Array, Array]:
    """Along the last axis."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high


def answers(low: Array, high: Array, moved: Array) -> list[Answer]:
    """Return what of the gains between `low` and `high` (R,) is worth saying of curves that `moved` (R,) so far."""
    return [ANSWERS[bool(a), bool(b)] for a, b in zip(low > 0, high <= WIDE * moved, strict=True)]


def _why(answer: Answer) -> str | None:
    none = "no gain at all cannot be excluded"
    wide = "more than twice what the curve has moved so far cannot be excluded"
    return {"interval": None, "at least": wide, "at most": none, "not identified": f"{none}, and {wide}"}[answer]


def _laws(measured: _Measured) -> tuple[paths.Law, ...]:
    curve = measured.curve
    if curve.covariance is None or len(np.unique(measured.distance)) < 3:
        return ()
    covariance = paths.errors_of(curve)
    return tuple(paths.fit_law(name, measured.distance, curve.mean, covariance) for name in paths.LAWS)


def _nothing(measured: _Measured, estimand: str, level: float, reason: str) -> Headroom:
    return Headroom(
        evaluation=measured.curve.name,
        estimand=estimand,
        answer="not identified",
        low=None,
        high=None,
        level=level,
        smooth_low=None,
        smooth_high=None,
        weights=(),
        laws=(),
        axis=measured.axis,
        reason=reason,
        notes=measured.notes,
    )


def _forecast(
    curve: Curve,
    ahead: int,
    version: int,
    numbers: tuple[float | None, ...],
    values: Array,
    level: float,
    why: str | None,
) -> Forecast:
    median, low, high, smooth_low, smooth_high = numbers
    se = curve.se
    return Forecast(
        evaluation=curve.name,
        estimand=f"the true {curve.name} at version {version}, {ahead} evaluations after the last measured one",
        ahead=ahead,
        version=version,
        median=median,
        low=low,
        high=high,
        level=level,
        smooth_low=smooth_low,
        smooth_high=smooth_high,
        draws=values,
        persistence=None if se is None or not len(se) else (float(curve.mean[-1]), float(se[-1])),
        not_identified=why,
    )
