"""Have reward and evaluation parted, and since when: states with a stated false-alarm rate per run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from configs.errors import UserError
from trainers.mismatch import scan
from trainers.mismatch.series import Array, Curve, Series

Crossing = tuple[float, int, int, int]  # z, start, stop, latest
State = Literal["aligned", "flattening", "parted", "decayed", "broken"]

MARGIN_SE = 0.7  # the default margin, in standard errors of one evaluation
AROUND_PEAK = 2  # points, the peak the last of them, which stand for the time before a fall that has a shape
HELD = 3  # points for which the minimum detectable drop is held
POWER_RUNS, POWER_SEED = 2_000, 1  # simulated for it
LARGEST_DROP, HALVINGS = 100.0, 15  # up to which it is searched, in margins and standard errors
FEWEST = 3  # evaluated versions before anything is said
SLOPE_POINTS = 5  # the latest points whose slope is compared with the slope before


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the alarm is asked for. Raises UserError for a number outside its range."""

    alpha: float = 0.05  # false alarms per run, of the primary evaluation; and of all the others together
    # a drop that does not matter, in the evaluation's unit; None: 0.7 of its standard error
    margin: float | None = None
    planned: int | None = None  # evaluated versions the run will have; None: not known
    power: float = 0.8  # of the minimum detectable drop
    runs: int = 20_000  # simulated for the boundary
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or not 0 < self.power < 1:
            raise UserError(f"alpha {self.alpha} and power {self.power} must lie between 0 and 1")
        if self.margin is not None and not 0 <= self.margin < np.inf:
            raise UserError(f"margin {self.margin} must be a number, 0 or more")
        if self.planned is not None and self.planned < FEWEST:
            raise UserError(f"{self.planned} planned evaluations are too few: the alarm needs {FEWEST}")
        if self.runs * self.alpha < 100:
            raise UserError(
                f"{self.runs} simulated runs are too few for alpha {self.alpha}: take {100 / self.alpha:.0f}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """One fall that raised the alarm: the contrast that did, as versions and places in the curve."""

    raised: int  # version at which it was seen
    since: int  # last version of the block that it fell from
    look: int
    start: int
    stop: int
    latest: int
    recovered: int | None = None  # version at which the latest points were back within the margin


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """What the scan says about one evaluation. Drops are in the evaluation's unit."""

    evaluation: str
    alpha: float  # this evaluation's own level per run: by Holm, unless it is the primary one
    raised: bool  # at any version so far
    falls: tuple[Fall, ...]  # in order; only the last may be unrecovered
    margin: float
    # a step held for 3 points that is found with Settings.power; None: not enough, or none is found so soon
    minimum_detectable_drop: float | None
    not_enough: str | None  # why nothing is said

    @property
    def fallen(self) -> Fall | None:
        """The fall that still stands."""
        return self.falls[-1] if self.falls and self.falls[-1].recovered is None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The state of a run, on its primary evaluation, and the alarm of every evaluation."""

    state: State | None  # None: not enough, see reasons
    since_version: int | None  # of a fall: the last version before it; else the first version of the state
    history: tuple[tuple[int, State], ...]  # (version, state as it was said then) of the primary evaluation
    primary: Alarm
    others: tuple[Alarm, ...]
    false_alarm_rate: float  # per run, of the primary; the family of the others has the same
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scanned:
    """One curve, scanned at every look; (K,) by look."""

    curve: Curve
    covariance: Array  # (K, K) floored
    margins: Array
    scale: Array
    best: tuple[tuple[Crossing, ...], ...]  # by look, the largest for each length of the latest block
    maxima: scan.Runs


def judge(series: Series, settings: Settings | None = None) -> Verdict:
    """Scan every evaluation and name the state of the run at each of its versions.

    The primary evaluation is tested at `alpha` per run, the others among themselves by Holm 1979 at the same level.
    Once an evaluation has fallen by more than the margin, the reward over the same two blocks of versions decides by
    one-sided tests at `alpha`: it rose, `parted`; it fell, `broken`; neither is shown, `decayed`. (An intersection of
    two rejections: Berger 1982, no correction.) Else the state is `aligned`, or `flattening`: the slope of the latest 5
    points is not shown to be positive and is smaller than the slope before, both at `alpha` a look, an early warning
    without a rate per run. Raises UserError when there are more evaluated versions than were planned.
    """
    settings = settings or Settings()
    named = [_prepare(curve, settings) for curve in series.evaluations]
    first = named[0]
    primary = first if isinstance(first, Alarm) else _alarm(first, settings.alpha, settings)
    reasons = [f"{a.evaluation}: {a.not_enough}" for a in named if isinstance(a, Alarm) and a.not_enough]
    reasons += [f"{curve.name}: {note}" for curve in series.evaluations for note in curve.notes]
    history: tuple[tuple[int, State], ...] = ()
    if isinstance(first, _Scanned):
        history = tuple(_states(first, primary, series.reward, settings.alpha))
        reasons += _reward_reasons(series.reward, first.curve)
    state = history[-1][1] if history else None
    return Verdict(
        state=state,
        since_version=primary.fallen.since if primary.fallen else _unchanged_since(history),
        history=history,
        primary=primary,
        others=_holm(named[1:], settings),
        false_alarm_rate=settings.alpha,
        reasons=tuple(reasons),
    )


def _prepare(curve: Curve, settings: Settings) -> _Scanned | Alarm:
    """Scan a curve, or say why it cannot be."""
    points = len(curve.versions)
    if settings.planned is not None and points > settings.planned:
        raise UserError(
            f"{curve.name} has {points} evaluated versions, {settings.planned} were planned: raise the plan"
        )
    why = None
    if points < FEWEST:
        why = f"not enough: {points} evaluated versions, {FEWEST} are needed"
    elif curve.covariance is None:
        why = f"not enough: no standard error; give {curve.name}_se or per-prompt scores"
    elif not np.any(np.diag(curve.covariance) > 0):
        why = "not enough: all prompts score the same at every version, so no standard error is known"
    if why or curve.covariance is None:
        return Alarm(
            evaluation=curve.name,
            alpha=settings.alpha,
            raised=False,
            falls=(),
            margin=settings.margin or 0.0,
            minimum_detectable_drop=None,
            not_enough=why,
        )
    covariance = scan.floored(curve.covariance)
    margins = margin_by_look(covariance, settings.margin)
    scale = scan.noise_scale(curve.mean[:, None], covariance, curve.versions)[:, 0]
    values = scan.winsorised(curve.mean[:, None], covariance)[:, 0]
    best: list[tuple[Crossing, ...]] = [()]
    for look in range(1, points):
        found = scan.contrasts(covariance, look)
        z = (found.weights @ values[: look + 1] - margins[look]) / (found.sd * scale[look]) - found.handicap
        tops = [int(np.argmax(np.where(found.latest == m, z, -np.inf))) for m in np.unique(found.latest)]
        best.append(tuple(_crossing(float(z[i]), found, i, curve.mean) for i in tops))
    maxima = scan.null_maxima(covariance, settings.runs, settings.seed, curve.versions)
    return _Scanned(curve=curve, covariance=covariance, margins=margins, scale=scale, best=tuple(best), maxima=maxima)


def _crossing(z: float, found: scan.Contrasts, place: int, mean: Array) -> Crossing:
    """Say which contrast it is. A shape knows the peak to a point or two only: it is taken for the highest point."""
    start, stop, latest = (int(of[place]) for of in (found.start, found.stop, found.latest))
    if found.handicap[place] == 0:
        stop = found.look - int(np.argmax(mean[start : found.look][::-1]))
        start = max(start, stop - AROUND_PEAK)
    return z, start, stop, latest


def margin_by_look(covariance: Array, margin: float | None) -> Array:
    """Return the margin at each look (K,): as given, or from the effective standard errors up to the look."""
    points = len(covariance)
    if margin is not None:
        return np.full(points, margin)
    errors = scan.effective_errors(covariance)
    return MARGIN_SE * np.array([np.median(errors[: max(look, 1)]) for look in range(points)])


def _boundary(scanned: _Scanned, alpha: float, settings: Settings) -> Array:
    return scan.for_prompts(scan.boundary(scanned.maxima, alpha, settings.planned), scanned.curve.prompts)


def _alarm(scanned: _Scanned, alpha: float, settings: Settings) -> Alarm:
    bound = _boundary(scanned, alpha, settings)
    falls = _falls(scanned, bound)
    drop = detectable_drop(
        scanned.covariance, bound, float(scanned.margins[-1]), settings.power, float(scanned.scale[-1])
    )
    return Alarm(
        evaluation=scanned.curve.name,
        alpha=alpha,
        raised=bool(falls),
        falls=falls,
        margin=float(scanned.margins[-1]),
        minimum_detectable_drop=drop if np.isfinite(drop) else None,
        not_enough=None,
    )


def _falls(scanned: _Scanned, bound: Array) -> tuple[Fall, ...]:
    """Walk the looks: a fall begins where the scan crosses, and ends where the latest points are back in the margin.

    Points before a recovery are not taken for latest ones again: they would raise the same alarm twice.
    """
    curve, falls, standing, fresh = scanned.curve, list[Fall](), None, 0
    for look in range(1, len(curve.versions)):
        version = int(curve.versions[look])
        if standing is not None:
            now = np.mean(curve.mean[look + 1 - standing.latest : look + 1])
            if np.mean(curve.mean[standing.start : standing.stop]) - now > scanned.margins[look]:
                continue
            falls[-1] = _ended(standing, version)
            standing, fresh = None, look
            continue
        allowed = [one for one in scanned.best[look] if look + 1 - one[3] >= fresh]
        z, start, stop, latest = max(allowed, default=(-np.inf, 0, 0, 0))
        if z > bound[look]:
            since = int(curve.versions[stop - 1])
            standing = Fall(raised=version, since=since, look=look, start=start, stop=stop, latest=latest)
            falls.append(standing)
    return tuple(falls)


def _ended(fall: Fall, version: int) -> Fall:
    fields = {name: getattr(fall, name) for name in ("raised", "since", "look", "start", "stop", "latest")}
    return Fall(**fields, recovered=version)


def detectable_drop(covariance: Array, bound: Array, margin: float, power: float, scale: float = 1.0) -> float:
    """Return the step that the latest look finds with `power`, held for the latest 3 points, by simulation.

    `covariance` (K, K) of the errors, `bound` (K,) of the scan, `scale` the noise scale so far; in the evaluation's
    unit. Fewer where there are fewer than 6 points. Infinite where no step is found so soon.
    """
    points = len(covariance)
    noise = scale * scan.null_paths(covariance, POWER_RUNS, POWER_SEED)
    after = (np.arange(points) >= points - min(HELD, points // 2)).astype(np.float64)[:, None]
    margins = np.full(points, margin)

    def found(drop: float) -> bool:
        maxima = scan.path_maxima(noise - drop * after, covariance, margins, last_only=True)
        return bool(np.mean(maxima[-1] > bound[-1]) >= power)

    low, high = 0.0, LARGEST_DROP * (margin + scale * float(np.sqrt(covariance.trace() / points)))
    if not found(high):
        return float(np.inf)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _holm(named: Sequence[_Scanned | Alarm], settings: Settings) -> tuple[Alarm, ...]:
    """Step down: test all at alpha / J; each rejection lets the rest be tested at the next larger share."""
    tested = [one for one in named if isinstance(one, _Scanned)]
    alarms: dict[str, Alarm] = {}
    while len(alarms) < len(tested):
        alpha = settings.alpha / (len(tested) - len(alarms))
        rest = [one for one in tested if one.curve.name not in alarms]
        now = {one.curve.name: _alarm(one, alpha, settings) for one in rest}
        rejected = {name: alarm for name, alarm in now.items() if alarm.raised}
        alarms.update(rejected or now)
    return tuple(one if isinstance(one, Alarm) else alarms[one.curve.name] for one in named)


def _states(scanned: _Scanned, alarm: Alarm, reward: Curve, alpha: float) -> list[tuple[int, State]]:
    """Return (version, state) as it was said at each look, from the third point on."""
    out: list[tuple[int, State]] = []
    for look in range(FEWEST - 1, len(scanned.curve.versions)):
        version = int(scanned.curve.versions[look])
        standing = [f for f in alarm.falls if f.look <= look and (f.recovered is None or f.recovered > version)]
        if standing:
            out.append((version, _fallen_state(standing[-1], look, scanned.curve, reward, alpha)))
        else:
            out.append((version, "flattening" if _flattening(scanned, look, alpha) else "aligned"))
    return out


def _fallen_state(fall: Fall, look: int, curve: Curve, reward: Curve, alpha: float) -> State:
    """Name a fall by what the reward did between the same two blocks of versions."""
    z = reward_change(reward, curve, (fall.start, fall.stop), (look + 1 - fall.latest, look + 1))
    critical = stats.norm.isf(alpha)
    if z is None or abs(z) <= critical:
        return "decayed"
    return "parted" if z > 0 else "broken"


def reward_change(reward: Curve, curve: Curve, before: tuple[int, int], after: tuple[int, int]) -> float | None:
    """Return the rise of the reward between two blocks [start, stop) of `curve`'s points, in its standard errors.

    All rewards of versions within each block count. A reward without standard errors is given those that its second
    differences show. None: the reward was not measured within both blocks, or nothing says how large its errors are.
    """
    weights = np.zeros(len(reward.versions))
    for (start, stop), sign in ((before, -1.0), (after, 1.0)):
        low, high = curve.versions[start], curve.versions[stop - 1]
        inside = (reward.versions >= low) & (reward.versions <= high)
        if not inside.any():
            return None
        weights += sign * inside / inside.sum()
    rise = float(weights @ reward.mean)
    if reward.covariance is not None:
        variance = float(weights @ reward.covariance @ weights)
    elif len(reward.versions) >= FEWEST:
        steps = reward.mean[2:] - 2 * reward.mean[1:-1] + reward.mean[:-2]
        variance = float(np.mean(steps**2) / 6 * (weights @ weights))
    else:
        return None
    if variance <= 0:
        return None if rise == 0 else float(np.sign(rise)) * np.inf
    return rise / float(np.sqrt(variance))


def _flattening(scanned: _Scanned, look: int, alpha: float) -> bool:
    before = look + 1 - SLOPE_POINTS
    if before < FEWEST:
        return False
    recent, early = np.zeros(look + 1), np.zeros(look + 1)
    recent[before:] = _slope_weights(scanned.curve.versions[before : look + 1].astype(np.float64))
    early[:before] = _slope_weights(scanned.curve.versions[:before].astype(np.float64))
    covariance = scanned.covariance[: look + 1, : look + 1] * scanned.scale[look] ** 2
    critical = stats.norm.isf(alpha)

    def z(weights: Array) -> float:
        return float(weights @ scanned.curve.mean[: look + 1] / np.sqrt(max(weights @ covariance @ weights, 1e-300)))

    return bool(z(early) > critical and z(early - recent) > critical and z(recent) <= critical)


def _slope_weights(x: Array) -> Array:
    centred = x - x.mean()
    return np.asarray(centred / (centred @ centred))


def _unchanged_since(history: Sequence[tuple[int, State]]) -> int | None:
    since = None
    for version, state in reversed(history):
        if state != history[-1][1]:
            break
        since = version
    return since


def _reward_reasons(reward: Curve, primary: Curve) -> list[str]:
    reasons = [f"{reward.name}: {note}" for note in reward.notes]
    if reward.covariance is None:
        reasons.append(f"{reward.name} has no standard error: its own second differences stand in for it")
    if not np.any((reward.versions >= primary.versions[0]) & (reward.versions <= primary.versions[-1])):
        reasons.append(f"{reward.name} was not measured between the evaluated versions: a fall is called decayed")
    return reasons
