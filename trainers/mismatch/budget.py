"""How many prompts and evaluations a run needs, so that the alarm finds a fall that matters, and at what cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.errors import UserError
from trainers.mismatch import scan
from trainers.mismatch.alarm import Settings, detectable_drop, margin_by_look
from trainers.mismatch.series import Array, Curve

HELD = 3  # evaluations after the fall, as in the alarm's minimum detectable drop
FEWEST_PROMPTS = 30  # of fewer, a mean of scores is not nearly normal
MOST_PROMPTS = 10**9
EVALUATIONS = (6, 10, 20, 50)
MOST_CORRELATED = 0.99  # of two versions: that they answer alike is no plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be found, how scores scatter, and what they cost. Raises UserError for a number outside its range."""

    drop: float  # in the evaluation's unit, or see in_se_of
    score_sd: float  # standard deviation of the scores of single prompts, in the evaluation's unit
    correlation: float = 0.0  # of one prompt's scores at two versions; 0 also where prompts are not kept
    in_se_of: int | None = None  # prompts: `drop` counts effective standard errors of an evaluation with so many
    base_rate: float = 0.5  # share of runs that fall by so much
    prompt_cost: float = 1.0  # of one evaluated prompt, in any unit
    evaluation_cost: float = 0.0  # of one evaluation besides its prompts, in the same unit
    within: float = 0.35  # share of the run that the 3 evaluations after the fall may take
    most_prompts: int = MOST_PROMPTS  # that there are

    def __post_init__(self) -> None:
        if not 0 < self.drop < np.inf or not 0 < self.score_sd < np.inf:
            raise UserError(f"drop {self.drop} and score_sd {self.score_sd} must be positive")
        if not 0 <= self.correlation < 1:
            raise UserError(f"correlation {self.correlation} must be 0 or more and below 1")
        if not 0 < self.base_rate < 1 or not 0 < self.within <= 1:
            raise UserError(f"base_rate {self.base_rate} and within {self.within} must lie between 0 and 1")
        if not 0 <= self.prompt_cost < np.inf or not 0 <= self.evaluation_cost < np.inf:
            raise UserError(
                f"prompt_cost {self.prompt_cost} and evaluation_cost {self.evaluation_cost} must be 0 or more"
            )
        if self.most_prompts < FEWEST_PROMPTS:
            raise UserError(f"most_prompts {self.most_prompts} must be {FEWEST_PROMPTS} or more")
        if self.in_se_of is not None and self.in_se_of < 1:
            raise UserError(f"in_se_of {self.in_se_of} must be 1 or more prompts")

    @property
    def in_unit(self) -> float:
        """The drop in the evaluation's unit. An effective standard error is that of a difference over the root of 2."""
        if self.in_se_of is None:
            return self.drop
        return float(self.drop * self.score_sd * np.sqrt((1 - self.correlation) / self.in_se_of))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One number of evaluations, the prompts that each of them then needs, and what that costs."""

    evaluations: int  # of the whole run, evenly spaced, the first at its start
    prompts: int  # the same ones at each
    detectable_drop: float  # in the evaluation's unit
    delay: float  # share of the run from a fall to its alarm
    cost: float  # of all evaluations


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The cheapest option that finds the drop in time, beside all that find it."""

    drop: float  # in the evaluation's unit
    chosen: Option | None  # None: see not_enough
    options: tuple[Option, ...]  # by number of evaluations
    power: float  # least probability that such a fall is found in time
    false_alarm_rate: float  # most per run without a fall
    alarm_is_real: float  # least probability that a run with an alarm fell, at the base rate
    not_enough: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """How the scores of one evaluation scattered in a run that was measured."""

    score_sd: float  # standard deviation of the scores of single prompts, in the evaluation's unit
    correlation: float  # of one prompt's scores at two versions, from 0 on
    prompts: int
    versions: int


def scatter(curve: Curve, prompts: int | None = None) -> Scatter:
    """Read off a curve (n,) how its scores scatter between prompts, and how much of that two versions share.

    From the covariance of its means: the mean variance, times the prompts, and the mean covariance of two versions over
    it; 0 where the versions' errors are independent or there is but one. `prompts` behind each mean, where the curve
    does not know them. Raises UserError where the errors or the prompts are not known, and where no score differs.
    """
    if curve.covariance is None:
        raise UserError(f"{curve.name} has no standard error: give {curve.name}_se or per-prompt scores")
    prompts = curve.prompts if curve.prompts is not None else prompts
    if prompts is None:
        raise UserError(f"how many prompts stand behind {curve.name}_se is not known: give --prompts, or their scores")
    if prompts < 1:
        raise UserError(f"--prompts {prompts}: it must be 1 or more")
    points, total = len(curve.versions), float(curve.covariance.sum())
    variance = float(curve.covariance.trace()) / max(points, 1)
    if variance <= 0:
        raise UserError(f"all prompts of {curve.name} score the same at every version: nothing is known of its scatter")
    shared = (total / points - variance) / (points - 1) if points > 1 else 0.0
    return Scatter(
        score_sd=float(np.sqrt(variance * prompts)),
        correlation=float(np.clip(shared / variance, 0, MOST_CORRELATED)),
        prompts=prompts,
        versions=points,
    )


def evaluation_budget(
    wanted: Wanted, settings: Settings | None = None, evaluations: Sequence[int] = EVALUATIONS
) -> Budget:
    """Return the fewest prompts with which the alarm detects the drop, by number of evaluations, and the cheapest.

    The alarm's own boundary and minimum detectable drop, at its `alpha`, `power` and `margin`; each number is taken as
    planned. More evaluations see a fall sooner and cost more; each needs about as many prompts. Raises
    UserError for a number of evaluations that is too small, and for a margin which is no smaller than the drop.
    """
    settings, drop = settings or Settings(), wanted.in_unit
    if settings.margin is not None and settings.margin >= drop:
        raise UserError(f"a margin of {settings.margin:g} hides a drop of {drop:g}: take a smaller margin")
    found = [_option(wanted, settings, points) for points in sorted(set(evaluations))]
    options = tuple(option for option in found if option is not None)
    in_time = [option for option in options if option.delay <= wanted.within]
    why = None
    if not options:
        why = f"not enough: {wanted.most_prompts} prompts do not show a drop of {drop:g}"
    elif not in_time:
        why = (
            f"not enough: the fall is seen after {min(option.delay for option in options):.0%} of the run at best, "
            f"{wanted.within:.0%} are allowed: evaluate more often"
        )
    real, false = wanted.base_rate * settings.power, (1 - wanted.base_rate) * settings.alpha
    return Budget(
        drop=drop,
        chosen=min(in_time, key=lambda option: option.cost, default=None),
        options=options,
        power=settings.power,
        false_alarm_rate=settings.alpha,
        alarm_is_real=real / (real + false),
        not_enough=why,
    )


def _option(wanted: Wanted, settings: Settings, points: int) -> Option | None:
    """Search the fewest prompts; the detectable drop falls as they grow. None: there are not enough of them."""
    if points < 2 * HELD:
        raise UserError(f"{points} evaluations are too few: {HELD} before a fall and {HELD} after it are needed")
    shared, alone = wanted.correlation, 1 - wanted.correlation
    scores = wanted.score_sd**2 * (alone * np.eye(points) + shared * np.ones((points, points)))
    maxima = scan.null_maxima(scores, settings.runs, settings.seed)
    bound = scan.boundary(maxima, settings.alpha, points)

    def detectable(prompts: int) -> float:
        errors: Array = scores / prompts
        margin = float(margin_by_look(errors, settings.margin)[-1])
        return detectable_drop(errors, scan.for_prompts(bound, prompts), margin, settings.power)

    high = FEWEST_PROMPTS
    while detectable(high) > wanted.in_unit:
        if high >= wanted.most_prompts:
            return None
        high = min(2 * high, wanted.most_prompts)
    low = FEWEST_PROMPTS - 1 if high == FEWEST_PROMPTS else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(middle) <= wanted.in_unit else (middle, high)
    return Option(
        evaluations=points,
        prompts=high,
        detectable_drop=detectable(high),
        delay=HELD / (points - 1),
        cost=points * (wanted.evaluation_cost + high * wanted.prompt_cost),
    )
