"""How far reward and evaluation are apart since the base, and what part of the reward's rise is length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from configs.errors import UserError
from trainers.mismatch.series import Array, Curve, Integers, Series, complete, symmetric_root

FEWEST = 5  # versions
LEAST_RELIABILITY = 0.3  # share of what was seen that is not measurement error
NEEDED = (
    "score reward and length of the same prompts (in a recipe: scorers of these names in one evaluation task), or give "
    "a column length and the standard errors of the reward"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One number without unit and its interval; None where nothing is said, see `not_enough`."""

    name: str
    estimand: str
    value: float | None
    low: float | None
    high: float | None
    level: float
    n: int  # versions
    not_enough: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """Reward and length of the answers to the same N prompts at n versions. Raises UserError for shapes that differ."""

    reward: str  # their names
    length: str
    versions: Integers  # (n,) increasing
    rewards: Array  # (n, N); NaN: undefined
    lengths: Array  # (n, N)

    def __post_init__(self) -> None:
        shapes = f"rewards {self.rewards.shape} and lengths {self.lengths.shape}"
        if self.rewards.shape != self.lengths.shape or len(self.rewards) != len(self.versions):
            raise UserError(f"{shapes} must both be {len(self.versions)} versions by prompts")


def proxy_gold_gap(series: Series, *, level: float = 0.95, draws: int = 300, seed: int = 0) -> Ratio:
    """Return how much of the primary evaluation was gained with the reward since the first version that has both.

    The estimand: the least-squares slope, through the base, of the true gains of the evaluation on those of the reward,
    each in units of the root mean square of its own gains: 1, the two gain in step; 0, what the reward gains brings
    nothing; below 0, it costs. (Their uncentred correlation.) What the errors add to products and squares is taken
    away; the interval spans the percentile and the basic one of a parametric bootstrap of the errors, at the level at
    which it covers in a second bootstrap (Davison & Hinkley 1997, ch. 5): near 1 and -1 it would cover too little.
    """
    reward, gold = series.reward, series.primary
    joint = np.intersect1d(reward.versions, gold.versions)
    n = len(joint)
    name = f"gap of {reward.name} and {gold.name}"
    estimand = (
        f"slope through the base of the true gains of {gold.name} on those of {reward.name} since version "
        f"{joint[0] if n else '-'}, each in units of its own root mean square"
    )
    if n < FEWEST:
        return _nothing(name, estimand, level, n, f"not enough: {n} versions have both, {FEWEST} are needed")
    estimand += _exact(reward, gold)
    since = np.concatenate([-np.ones((n - 1, 1)), np.eye(n - 1)], 1)
    gains = [since @ curve.at(joint).mean for curve in (reward, gold)]
    errors = [_errors(curve.at(joint), since) for curve in (reward, gold)]
    for curve, gain, error in zip((reward, gold), gains, errors, strict=True):
        size = float(gain @ gain)
        if np.max(np.abs(gain)) <= 1e-12 * np.max(np.abs(curve.at(joint).mean)):
            return _nothing(name, estimand, level, n, f"not enough: {curve.name} is constant")
        if 1 - float(np.trace(error)) / size < LEAST_RELIABILITY:
            share = min(float(np.trace(error)) / size, 1)
            return _nothing(name, estimand, level, n, f"not enough: {share:.0%} of the gains of {curve.name} is error")
    noise = [float(np.trace(error)) for error in errors]
    rng = np.random.default_rng(seed)
    x, y = (rng.standard_normal((draws, n - 1)) @ symmetric_root(error) for error in errors)
    value = float(_through_base(gains[0], gains[1], (noise[0], noise[1])))
    again = _through_base(gains[0] + x, gains[1] + y, (2 * noise[0], 2 * noise[1]))  # a draw has the errors twice
    kept = again[np.isfinite(again)]
    if len(kept) < 0.99 * draws:
        return _nothing(name, estimand, level, n, "not enough: the gains are not clearly larger than their errors")
    tail = _calibrated((gains[0], gains[1]), (x, y), (noise[0], noise[1]), level)
    first, last = np.quantile(kept, [tail, 1 - tail])
    edges = value, first, last, 2 * value - first, 2 * value - last  # percentile and basic: one alone covers too little
    low, high = (float(np.clip(edge, -1, 1)) for edge in (min(edges), max(edges)))
    value = float(np.clip(value, -1, 1))
    return Ratio(name=name, estimand=estimand, value=value, low=low, high=high, level=level, n=n, not_enough=None)


def share_of_length(series: Series, answers: Answers | None, length: Curve | None, *, level: float = 0.95) -> Ratio:
    """Return the part of the reward's rise that length explains, from the best of what is known of the run.

    Reward and length of the same prompts (`length_share_of_prompts`), where prompts that are undefined at some version
    are left out; else the curves of both (`length_share`), where the reward's errors are known.
    """
    if answers is not None:
        both = answers.rewards + answers.lengths
        kept, columns, _ = complete(answers.versions, np.where(np.isfinite(both), both, np.nan))
        share = length_share_of_prompts(
            answers.versions[kept].tolist(),
            answers.rewards[np.ix_(kept, columns)],
            answers.lengths[np.ix_(kept, columns)],
            level=level,
        )
        return replace(share, name=f"share of {answers.length} in {answers.reward}")
    if length is None:
        why = "no length is known"
    elif series.reward.covariance is None:
        why = f"{series.reward.name} has no standard error"
    else:
        return length_share(series, length, level=level)
    name = f"share of length in {series.reward.name}"
    estimand = "the part of the reward's rise that length explains"
    return _nothing(name, estimand, level, 0, f"not enough: {why}; {NEEDED}")


def length_share(series: Series, length: Curve, *, level: float = 0.95) -> Ratio:
    """Return the part of the reward's rise that a curve of mean lengths explains.

    The estimand: slope of the reward's changes on those of the length between consecutive versions, beyond the mean
    change of each, times the rise of the length, over the rise of the reward. The common drift is left out since
    whatever else rose would count as length; where little but drift is left, nothing is said: give per-prompt lengths
    to `length_share_of_prompts`. The interval is that of the delta method, with quantiles of
    Student's t; where an error is not known, what the slope leaves unexplained counts as error.
    """
    reward = series.reward
    joint = np.intersect1d(reward.versions, length.versions)
    n = len(joint)
    name = f"share of {length.name} in {reward.name}"
    estimand = (
        f"slope of the changes of {reward.name} on those of {length.name} between versions, beyond their mean, times "
        f"the rise of {length.name} over the rise of {reward.name}"
    )
    estimand += _exact(reward, length)
    if n < FEWEST + 1:
        return _nothing(name, estimand, level, n, f"not enough: {n} versions have both, {FEWEST + 1} are needed")
    steps = np.diff(np.eye(n), axis=0)
    centred = steps - steps.mean(0)
    moves, changes = centred @ length.at(joint).mean, centred @ reward.at(joint).mean
    error = float(np.trace(_errors(length.at(joint), centred)))
    size = float(moves @ moves)
    drift = length.at(joint).mean[-1] - length.at(joint).mean[0]
    rise = float(reward.at(joint).mean[-1] - reward.at(joint).mean[0])
    se = _errors(reward.at(joint), np.eye(n)[-1:] - np.eye(n)[:1])
    if not _clear(rise, float(np.sqrt(se[0, 0]))):
        return _nothing(name, estimand, level, n, f"not enough: {reward.name} did not clearly rise")
    if size <= 1e-18 * float(np.max(np.abs(length.mean))) ** 2 * n or 1 - error / size < 2 * LEAST_RELIABILITY:
        return _nothing(
            name, estimand, level, n, f"not enough: {length.name} moved too evenly to be told from the drift"
        )
    left = size - error
    slope = float(moves @ changes) / left
    value, ends = slope * drift / rise, np.eye(n)[-1:] - np.eye(n)[:1]
    by_reward = drift / rise / left * moves @ centred - value / rise * ends
    by_length = drift / rise / left * (changes - 2 * slope * moves) @ centred + slope / rise * ends
    variance = float(_errors(reward.at(joint), by_reward)[0, 0] + _errors(length.at(joint), by_length)[0, 0])
    if reward.covariance is None or length.covariance is None:
        variance += float(np.sum((changes - slope * moves) ** 2) / (n - 3) / left) * (drift / rise) ** 2
    half = float(stats.t.ppf((1 + level) / 2, n - 3) * np.sqrt(variance))
    return Ratio(
        name=name,
        estimand=estimand,
        value=value,
        low=value - half,
        high=value + half,
        level=level,
        n=n,
        not_enough=None,
    )


def length_share_of_prompts(
    versions: Sequence[int],
    rewards: Array,
    lengths: Array,
    *,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> Ratio:
    """Return the part of the reward's rise that length explains, from the same N prompts at n versions, both (n, N).

    The estimand: the slope of the reward on the length of the same prompt, at the same version, times the rise of the
    mean length over that of the mean reward. Means of prompts and versions are taken out before the slope (two-way
    within estimator), so neither hard prompts nor whatever else rose with the versions counts as length. The interval
    is a bootstrap over prompts. Raises UserError for shapes that differ or numbers that are not finite.
    """
    name = "share of length"
    estimand = (
        "slope of the reward on the length within prompt and version, times the rise of the mean length over the rise "
        "of the mean reward, first to last version"
    )
    n = len(versions)
    if rewards.shape != lengths.shape or len(rewards) != n:
        raise UserError(f"rewards {rewards.shape} and lengths {lengths.shape} must both be {n} versions by prompts")
    if not np.all(np.isfinite(rewards)) or not np.all(np.isfinite(lengths)):
        raise UserError("a reward or a length is not finite: leave that prompt out at every version")
    prompts = rewards.shape[1]
    if n < 2 or prompts < 10:
        why = f"not enough: {n} versions and {prompts} prompts, 2 and 10 are needed"
        return _nothing(name, estimand, level, n, why)
    drawn = np.random.default_rng(seed).integers(0, prompts, (draws, prompts))
    counts = np.stack([np.ones(prompts), *(np.bincount(row, minlength=prompts) for row in drawn)])
    rise = counts @ (rewards[-1] - rewards[0]) / prompts
    if not _clear(float(rise[0]), float(rise[1:].std())):
        return _nothing(name, estimand, level, n, "not enough: the reward did not clearly rise")
    shares = _slopes(rewards, lengths, counts) * (counts @ (lengths[-1] - lengths[0]) / prompts) / rise
    if not np.all(np.isfinite(shares)):
        return _nothing(name, estimand, level, n, "not enough: the lengths do not vary within prompts and versions")
    low, high = np.quantile(shares[1:], [(1 - level) / 2, (1 + level) / 2])
    return Ratio(
        name=name,
        estimand=estimand,
        value=float(shares[0]),
        low=float(min(low, shares[0])),
        high=float(max(high, shares[0])),
        level=level,
        n=n,
        not_enough=None,
    )


def _slopes(rewards: Array, lengths: Array, counts: Array) -> Array:
    """Slopes (S,) of rewards on lengths (n, N) within prompts and versions, each prompt taken `counts` (S, N) times.

    Means of prompts do not depend on the counts; what a resample adds to those of versions is taken from the sums of
    squares and products. NaN where the lengths do not vary.
    """
    x, y = (z - z.mean(0) - z.mean(1, keepdims=True) + z.mean() for z in (lengths, rewards))
    added, prompts = [counts @ z.T for z in (x, y)], lengths.shape[1]
    size = counts @ (x * x).sum(0) - (added[0] ** 2).sum(1) / prompts
    product = counts @ (x * y).sum(0) - (added[0] * added[1]).sum(1) / prompts
    varies = size > 1e-18 * (counts @ (lengths * lengths).sum(0))
    return np.asarray(np.where(varies, product / np.where(varies, size, 1), np.nan))


def _clear(rise: float, se: float) -> bool:
    """Whether a denominator is far enough from 0: a ratio over less has no moments worth an interval."""
    return rise > 0 and rise > 3 * se


def _exact(*curves: Curve) -> str:
    names = [curve.name for curve in curves if curve.covariance is None]
    return f"; {' and '.join(names)} taken as exact: no standard error" if names else ""


def _errors(curve: Curve, weights: Array) -> Array:
    """Covariance (k, k) of the errors of weights (k, n) @ mean; 0 where it is not known."""
    if curve.covariance is None:
        return np.zeros((len(weights), len(weights)))
    return np.asarray(weights @ curve.covariance @ weights.T)


def _through_base(x: Array, y: Array, noise: tuple[float, float]) -> Array:
    """Return sum x y / sqrt(sum x^2 sum y^2) (...) of gains (..., n - 1), squares less their noise; NaN if negative."""
    return _ratio((x * y).sum(-1), (x * x).sum(-1) - noise[0], (y * y).sum(-1) - noise[1])


def _ratio(product: Array, first: Array, second: Array) -> Array:
    good = (first > 0) & (second > 0)
    root = np.sqrt(np.where(good, first, 1)) * np.sqrt(np.where(good, second, 1))
    return np.asarray(np.where(good, product / root, np.nan))


def _calibrated(
    gains: tuple[Array, Array], errors: tuple[Array, Array], noise: tuple[float, float], level: float
) -> float:
    """Return the share to leave out on each side, at most (1 - level) / 2.

    The measured gains (n - 1,) are the truth of a world in which runs are measured with the first half of the
    errors (S, n - 1) and bootstrapped with the second. Of each run: the largest share at which its interval still
    contains that truth; of these, the quantile at 1 - level.
    """
    (x, y), half = gains, len(errors[0]) // 2
    true = float(_through_base(x, y, (0.0, 0.0)))
    (u, v), (e, f) = ([x + errors[0][:half], y + errors[1][:half]], [one[half:] for one in errors])
    value = _through_base(u, v, noise)[:, None]
    product = (u * v).sum(1)[:, None] + u @ f.T + v @ e.T + (e * f).sum(1)
    first, second = ((a * a).sum(1)[:, None] + 2 * a @ b.T + (b * b).sum(1) for a, b in ((u, e), (v, f)))
    again = _ratio(product, first - 2 * noise[0], second - 2 * noise[1])
    known = np.maximum(np.isfinite(again).sum(1), 1)
    below, mirrored = ((again <= one).sum(1) / known for one in (true, 2 * value - true))
    kept = np.minimum(np.maximum(below, 1 - mirrored), np.maximum(1 - below, mirrored))
    return float(min((1 - level) / 2, np.quantile(kept, 1 - level)))


def _nothing(name: str, estimand: str, level: float, n: int, why: str) -> Ratio:
    return Ratio(name=name, estimand=estimand, value=None, low=None, high=None, level=level, n=n, not_enough=why)
