"""Which version is best, and how good is it: shortlist, re-evaluate, choose on pooled data, report from a third sample.

    listed = shortlist(curve)             # evaluate listed.versions again, on other prompts
    choice = choose(curve, again)         # again: that re-evaluation
    found = report(choice, fresh)         # fresh: choice.version and choice.base on prompts that neither has seen

The three samples must not share prompts; curves carry no prompts, so that is the caller's to keep. The maximum of noisy
values is biased upward, so is every value read off the data that it was chosen on; only an untouched sample has none.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from configs.errors import UserError
from trainers.mismatch import scan
from trainers.mismatch.series import Curve, Series, symmetric_root
from trainers.mismatch.smoothing import smooth

Source = Literal["untouched", "pooled", "curve"]
Rule = Literal["last", "highest reward", "KL budget", "raw best"]
RULES: tuple[Rule, ...] = ("last", "highest reward", "KL budget", "raw best")
Pick = tuple[int | None, str | None, str | None]  # version, note, not enough

FEWEST = 3  # evaluated versions before one is chosen
DRAWS, SEED = 1_000, 0  # of the posterior, for the shortlist


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its interval, in the evaluation's unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortlist:
    """The versions to evaluate again on other prompts, in order, the base among them."""

    evaluation: str
    base: int | None  # the first evaluated version; None: not enough
    versions: tuple[int, ...]
    not_enough: str | None  # why there is none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Final:
    """What was evaluated after the curve, each on prompts that the curve and the other one do not use."""

    again: Curve  # the shortlist, to choose on
    untouched: Curve  # the chosen version and the base, to report from


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """The chosen version and the data that it was chosen on."""

    evaluation: str
    version: int | None  # None: not enough
    base: int | None
    candidates: tuple[int, ...]  # it was chosen among
    pooled: Curve  # the curve, with the re-evaluation where there is one
    reevaluated: bool
    not_enough: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """How good the chosen version is, alone and beside the base."""

    evaluation: str
    version: int | None
    base: int | None
    value: Estimate | None  # None: not enough
    gain: Estimate | None  # over the base
    level: float
    source: Source  # the sample that value and gain are from
    estimand: str
    note: str | None  # what the interval rests on, where the sample is not untouched
    not_enough: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """What a simpler rule would have chosen among the evaluated versions."""

    rule: Rule
    version: int | None  # None: see not_enough
    value: Estimate | None
    gain: Estimate | None  # over the base
    source: Source
    note: str | None  # versions that the rule could not see
    not_enough: str | None


def shortlist(curve: Curve, size: int = 3, among: Collection[int] | None = None) -> Shortlist:
    """Return the base and the `size` other versions which together are expected to hold the best one.

    `among`: versions that can be evaluated again; None: all of the curve's.

    Greedy in the expected maximum of the true values over the set, under the posterior of `smooth`: submodular, so
    that greedy is near the optimum (Nemhauser, Wolsey & Fisher 1978). Neighbours that are sure to be alike do not fill
    the list, as they do when the largest means are taken. Raises UserError for a size below 1.
    """
    if size < 1:
        raise UserError(f"a shortlist of {size} versions has nothing to choose from: take 1 or more")
    why = _too_few(curve) or _unknown_errors(curve)
    if why:
        return Shortlist(evaluation=curve.name, base=None, versions=(), not_enough=why)
    mean, covariance = smooth(curve)
    normal = np.random.default_rng(SEED).standard_normal((DRAWS, len(mean))).T
    drawn = mean[:, None] + symmetric_root(covariance) @ normal
    places, best = [0], drawn[0]
    gone = [place for place, version in enumerate(curve.versions) if among is not None and version not in among]
    for _ in range(min(size, len(mean) - len({0, *gone}))):
        expected = np.maximum(best, drawn).mean(1)
        expected[gone] = -np.inf
        expected[places] = -np.inf
        places.append(max(range(len(mean)), key=lambda place: (expected[place], mean[place])))
        best = np.maximum(best, drawn[places[-1]])
    versions = tuple(int(version) for version in curve.versions[sorted(places)])
    return Shortlist(evaluation=curve.name, base=int(curve.versions[0]), versions=versions, not_enough=None)


def choose(curve: Curve, again: Curve | None = None) -> Choice:
    """Choose the version with the largest smoothed mean of `curve` and its re-evaluation `again`, pooled.

    `again`: some of the curve's versions on prompts disjoint from the curve's, the base (the first version) among them;
    only they are candidates. None: every version is. The base may be chosen. Raises UserError when `again` lacks the
    base or has a version that the curve has not.
    """
    why, pooled = _too_few(curve) or _unknown_errors(curve), curve
    if again is not None:
        _check_held(again, [int(curve.versions[0])] if len(curve.versions) else [], "the re-evaluation")
        strange = np.setdiff1d(again.versions, curve.versions)
        if len(strange):
            raise UserError(f"the re-evaluation has version {strange[0]}, which {curve.name} has not: leave it out")
        why = why or _unknown_errors(again)
        if not why:
            pooled = pool(curve, again)
    if why:
        return Choice(
            evaluation=curve.name,
            version=None,
            base=None,
            candidates=(),
            pooled=curve,
            reevaluated=False,
            not_enough=why,
        )
    candidates = curve.versions if again is None else again.versions
    mean, _ = smooth(pooled)
    best = int(np.argmax(mean[np.searchsorted(curve.versions, candidates)]))
    return Choice(
        evaluation=curve.name,
        version=int(candidates[best]),
        base=int(curve.versions[0]),
        candidates=tuple(int(version) for version in candidates),
        pooled=pooled,
        reevaluated=again is not None,
        not_enough=None,
    )


def report(choice: Choice, fresh: Curve | None = None, *, level: float = 0.95) -> Selected:
    """Return value and gain of the chosen version from `fresh`, prompts on which nothing was chosen.

    `fresh` needs the chosen version and the base. Its interval is the mean's own, Student's t for a covariance
    estimated from prompts. None: the posterior mean of `smooth` on the data that the choice was made on, with the
    larger of its spread and the measured one; the note says so. Raises UserError when `fresh` lacks one of the two.
    """
    source: Source = "untouched" if fresh is not None else "pooled" if choice.reevaluated else "curve"
    value = gain = note = None
    why = choice.not_enough
    if choice.version is not None and choice.base is not None:
        if fresh is not None:
            _check_held(fresh, [choice.version, choice.base], "the untouched sample")
            why = _unknown_errors(fresh)
        if not why:
            value, gain = _estimates(choice.pooled, choice.version, choice.base, fresh, smoothed=True, level=level)
            note = None if fresh is not None else _posterior_note(choice)
    of = f"true mean of {choice.evaluation} at version {choice.version} over prompts like those evaluated"
    return Selected(
        evaluation=choice.evaluation,
        version=choice.version,
        base=choice.base,
        value=value,
        gain=gain,
        level=level,
        source=source,
        estimand=f"{of}; gain: less that at version {choice.base}" if value else "",
        note=note,
        not_enough=why,
    )


def rivals(
    series: Series,
    *,
    evaluation: str | None = None,
    kl_budget: float | None = None,
    fresh: Curve | None = None,
    level: float = 0.95,
) -> tuple[Rival, ...]:
    """Return what "last", "highest reward", "KL budget" and "raw best" choose among the versions of an evaluation.

    `evaluation` None: the primary one. KL budget: the version with the largest KL of at most `kl_budget`. A version
    without reward or KL cannot be chosen by it; the note says which. Values are from `fresh` where it holds version
    and base, else from the evaluation itself, smoothed for "raw best", which was chosen on it. Raises UserError for
    an evaluation that the series has not.
    """
    named = {curve.name: curve for curve in series.evaluations}
    if evaluation is not None and evaluation not in named:
        raise UserError(f"there is no evaluation {evaluation}: the series has {', '.join(named)}")
    curve = named[evaluation] if evaluation is not None else series.primary
    why = _too_few(curve)
    picks: dict[Rule, Pick]
    if why:
        picks = dict.fromkeys(RULES, (None, None, why))
    else:
        picks = {
            "last": (int(curve.versions[-1]), None, None),
            "highest reward": _largest(series.reward, curve, np.inf),
            "KL budget": _largest(series.kl, curve, kl_budget),
            "raw best": (int(curve.versions[np.argmax(curve.mean)]), None, None),
        }
    return tuple(_rival(curve, fresh, level, rule, pick) for rule, pick in picks.items())


def pool(curve: Curve, again: Curve) -> Curve:
    """Combine a curve (n,) with a re-evaluation of m of its versions on other prompts.

    Generalised least squares (Aitken 1936) of the n true values on the n + m means; versions that were not evaluated
    again move too, as far as their errors are correlated with those that were. Both need standard errors.
    """
    if curve.covariance is None or again.covariance is None:
        raise ValueError(f"{curve.name}: pooling needs standard errors of both samples")
    first, second = scan.floored(curve.covariance), scan.floored(again.covariance)
    places = np.searchsorted(curve.versions, again.versions)
    both = first[np.ix_(places, places)] + second  # singular where two versions answer alike
    weights = first[:, places] @ np.linalg.pinv(both, hermitian=True)
    covariance = first - weights @ first[places]
    counts = [one.prompts for one in (curve, again) if one.prompts is not None]
    return Curve(
        name=curve.name,
        versions=curve.versions,
        mean=curve.mean + weights @ (again.mean - curve.mean[places]),
        covariance=(covariance + covariance.T) / 2,
        prompts=min(counts, default=None),
        notes=curve.notes + again.notes,
    )


def _estimates(
    curve: Curve, version: int, base: int, fresh: Curve | None, *, smoothed: bool, level: float
) -> tuple[Estimate, Estimate]:
    """Value of `version` and its gain over `base`, from `fresh`, or from the curve, smoothed or as it was measured.

    What smoothing gains in spread at a peak, it may lose in bias: a smoothed value's interval is as wide as the
    measured one's or wider. It also holds that of the middle between the two: a measured value is biased upward, a
    smoothed one at a sharp peak downward. The base was not chosen for its value and is taken as measured: a steep
    start would lift it.
    """
    used = curve if fresh is None else fresh
    if used.covariance is None:
        raise ValueError(f"{used.name}: an interval needs standard errors")
    stated = scan.floored(used.covariance)
    mean, covariance = smooth(used, rough=True) if fresh is None and smoothed else (used.mean, stated)
    tail = (1 - level) / 2
    quantile = float(stats.norm.isf(tail) if used.prompts is None else stats.t.isf(tail, used.prompts - 1))
    one, other = (int(np.searchsorted(used.versions, at)) for at in (version, base))
    alone = np.eye(len(mean))[one]
    gain = mean[one] - used.mean[other] if one != other else 0.0
    found = []
    for middle, weights in ((float(mean[one]), alone), (float(gain), alone - np.eye(len(mean))[other])):
        variance = max(weights @ covariance @ weights, weights @ stated @ weights, 0)
        half = quantile * float(np.sqrt(variance))
        aside = (float(weights @ used.mean) - middle) / 2 if smoothed else 0.0
        found.append(Estimate(value=middle, low=middle - half + min(aside, 0), high=middle + half + max(aside, 0)))
    return found[0], found[1]


def _rival(curve: Curve, fresh: Curve | None, level: float, rule: Rule, pick: Pick) -> Rival:
    version, note, why = pick
    base = int(curve.versions[0]) if len(curve.versions) else None
    held = fresh if fresh is not None and {version, base} <= set(fresh.versions.tolist()) else None
    value = gain = None
    why = why or _unknown_errors(held or curve)
    if version is not None and base is not None and not why:
        value, gain = _estimates(curve, version, base, held, smoothed=rule == "raw best", level=level)
    return Rival(
        rule=rule,
        version=version,
        value=value,
        gain=gain,
        source="untouched" if held else "curve",
        note=note,
        not_enough=why,
    )


def _largest(by: Curve | None, curve: Curve, most: float | None) -> Pick:
    """Choose the version of `curve` where `by` is largest and at most `most`; note where it was not measured."""
    if by is None or most is None:
        return None, None, "not enough: the series has no KL" if by is None else "not enough: no KL budget was declared"
    joint = np.intersect1d(by.versions, curve.versions)
    if not len(joint):
        return None, None, f"not enough: {by.name} was not measured at any evaluated version"
    missing = np.setdiff1d(curve.versions, joint).tolist()
    note = f"{by.name} was not measured at version {', '.join(map(str, missing))}" if missing else None
    values = by.at(joint).mean
    if not np.any(values <= most):
        return None, note, f"not enough: {by.name} is above {most:g} at every evaluated version that has it"
    return int(joint[np.argmax(np.where(values <= most, values, -np.inf))]), note, None


def _check_held(curve: Curve, versions: list[int], what: str) -> None:
    lacking = [version for version in versions if version not in curve.versions]
    if lacking:
        raise UserError(f"{what} lacks version {lacking[0]}: evaluate it there too, its gain is measured with it")


def _too_few(curve: Curve) -> str | None:
    points = len(curve.versions)
    return f"not enough: {points} evaluated versions, {FEWEST} are needed" if points < FEWEST else None


def _unknown_errors(curve: Curve) -> str | None:
    if curve.covariance is None:
        return f"not enough: no standard error; give {curve.name}_se or per-prompt scores"
    if not np.any(np.diag(curve.covariance) > 0):
        return "not enough: all prompts score the same at every version, so no standard error is known"
    return None


def _posterior_note(choice: Choice) -> str:
    sample = "the curve and its re-evaluation" if choice.reevaluated else "the curve alone"
    return (
        f"from {sample}, on which version {choice.version} was chosen: its measured mean there is biased upward; "
        "value and interval are smoothed, and rest on a prior for the path. Evaluate it on untouched prompts"
    )
