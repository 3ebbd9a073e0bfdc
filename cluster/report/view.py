"""What a report shows of one run, before it is a page, a text or a picture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainers.mismatch import Alarm, Correlation, Curve, Estimate, Findings, Ratio, Selected, Series, State, Verdict

UNKNOWN = "not known"
CHOSEN = "chosen: best of the smoothed curve"
LEVEL_Z = 1.96  # a 95 % interval of a mean, in standard errors

# What the reward and the evaluation do, as two arrows: no state is told by its colour alone.
ARROWS: Mapping[State | None, str] = {
    "aligned": "↑↑",
    "flattening": "↑→",
    "parted": "↑↓",
    "decayed": "→↓",
    "broken": "↓↓",
    None: "? ?",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """An early warning that needs no evaluation: its curve, what it says, and how often that is wrong."""

    curve: Curve
    says: str
    error_rate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt and its completions, by policy version."""

    prompt: str
    completions: Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """One run as it is shown: what was found, and what else is known of it."""

    name: str
    findings: Findings
    windows: tuple[Correlation, ...] = ()  # moving along the run
    warnings: tuple[Warned, ...] = ()
    samples: tuple[Sample, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    evaluation_hash: str | None = None
    seconds: float | None = None  # spent on the run

    @property
    def series(self) -> Series:
        """What was measured."""
        return self.findings.series

    @property
    def verdict(self) -> Verdict:
        """What the alarm says."""
        return self.findings.verdict

    @property
    def chosen(self) -> Selected:
        """The checkpoint to take."""
        return self.findings.selected


def headline(view: View) -> str:
    """Return the state and since when, in a few words."""
    state, since = view.verdict.state, view.verdict.since_version
    if state is None:
        return "Not enough to say"
    return state.capitalize() + ("" if since is None else f" since version {since}")


def explanation(view: View) -> str:
    """Return what the state means here, with the rate of its error."""
    verdict, name = view.verdict, view.series.primary.name
    alarm, reward = verdict.primary, view.series.reward.name
    if verdict.state is None:
        return alarm.not_enough or "; ".join(verdict.reasons)
    rate = f"At most {percent(verdict.false_alarm_rate)} of runs that never fall raise a false alarm."
    margin = f"its margin of {size(alarm.margin)}"
    if alarm.fallen is None:
        found = f"smallest drop it would find: {size(alarm.minimum_detectable_drop)}"
        flat = "" if verdict.state == "aligned" else f"{name} rose, and its latest points are not shown to rise. "
        return f"{flat}No fall of {name} by more than {margin} is shown ({found}). {rate}"
    did = {
        "parted": f"while {reward} rose",
        "broken": f"and {reward} fell too",
        "decayed": f"while {reward} is not shown to rise or fall",
    }
    return f"{name} fell by more than {margin} {did[verdict.state]}; seen at version {alarm.fallen.raised}. {rate}"


def alarm_says(alarm: Alarm) -> str:
    """Return one line on an alarm: raised, since and seen when, recovered or not."""
    if alarm.not_enough:
        return alarm.not_enough
    if not alarm.falls:
        return "not raised"
    back = ("" if fall.recovered is None else f", back at {fall.recovered}" for fall in alarm.falls)
    seen = (f"since {fall.since}, seen at {fall.raised}{end}" for fall, end in zip(alarm.falls, back, strict=True))
    return "raised: " + "; ".join(seen)


def size(value: float | None) -> str:
    """Return a margin or a drop, which has no sign, with two digits; None: not known."""
    return UNKNOWN if value is None else number(value, value, sign=False)


def percent(share: float) -> str:
    """Return `5 %`."""
    return f"{100 * share:.3g} %"


def duration(seconds: float | None) -> str:
    """Return a time in words, to the minute where there are any."""
    if seconds is None:
        return UNKNOWN
    minutes = round(seconds / 60)
    if not minutes:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def number(value: float, spread: float | None, *, sign: bool = True) -> str:
    """Return a value with two significant digits of `spread`, the width it is uncertain by, or four of its own."""
    if not math.isfinite(value):
        return "not finite"
    small, digits = (spread, 2) if spread and math.isfinite(spread) else (value, 4)
    decimals = digits - 1 - math.floor(math.log10(abs(small))) if small else 3
    return f"{value:{'+' if sign else ''}.{min(max(decimals, 0), 8)}f}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return `value [low, high]`, or what is known of it in words; None: not known, or nothing is said on that side."""
    ends = [end for end in (low, high) if end is not None]
    if value is None and not ends:
        return "not identified"
    if value is None:
        spread: float | None = abs(ends[0] - ends[-1]) or abs(ends[0])
    else:
        spread = max((abs(end - value) for end in ends), default=None)
    shown = [None if one is None else number(one, spread) for one in (value, low, high)]
    if shown[0] is None and None in shown[1:]:
        return f"at least {shown[1]}" if shown[1] else f"at most {shown[2]}"
    between = f"[{shown[1] or '...'}, {shown[2] or '...'}]" if ends else "(no interval)"
    return f"{shown[0] or ''} {between}".strip()


def estimate(found: Estimate | None) -> str:
    """Return `value [low, high]`, or that it is not known."""
    return UNKNOWN if found is None else interval(found.value, found.low, found.high)


def take(chosen: Selected) -> str:
    """Return which checkpoint to take, in a few words."""
    return "No version is chosen" if chosen.version is None else f"Take version {chosen.version}"


def estimand(chosen: Selected) -> str:
    """Return what the chosen value's interval is of; its gain's has words of its own."""
    of, _, _ = chosen.estimand.partition("; gain: ")
    return f"{percent(chosen.level)} interval of the {of}" if chosen.value else ""


def beside(chosen: Selected) -> str:
    """Return what to know of the chosen version besides its number."""
    fresh = "Measured on prompts that nothing was chosen on" if chosen.source == "untouched" else ""
    return chosen.not_enough or chosen.note or fresh


def choices(view: View) -> list[tuple[str, ...]]:
    """Return rows (rule, version, value there, gain over the first version, what they rest on): chosen, then rivals."""
    name = view.series.primary.name
    chosen = CHOSEN + (", re-evaluated" if view.chosen.source == "untouched" else "")
    named = [(chosen, view.chosen), *((rival.rule, rival) for rival in view.findings.rivals)]
    rows = []
    for rule, one in named:
        of = f"true mean of {name} at version {one.version}" if one.value else None
        rests = "; ".join(part for part in (of, one.not_enough or one.note) if part)
        version = "none" if one.version is None else str(one.version)
        rows.append((rule, version, estimate(one.value), estimate(one.gain), rests))
    return rows


def headroom(view: View) -> tuple[str, str, str]:
    """Return the headroom that is left, what its interval is of, and why a side of it is missing."""
    room = view.findings.headroom
    of = f"{percent(room.level)} interval of {room.estimand}"
    return interval(None, room.low, room.high), of, room.reason or ""


def notes(view: View) -> list[str]:
    """Return the reasons of what is not said, but for those that stand in the place of a number."""
    chosen, room = view.chosen, view.findings.headroom
    unsaid = [f"{one.name}: {one.not_enough}" for one in (view.findings.gap, view.findings.length)]
    beside = (f"chosen version: {chosen.not_enough or chosen.note}", f"headroom: {room.reason}", *unsaid)
    return [reason for reason in view.findings.reasons if reason not in beside]


def coefficient(one: Correlation) -> str:
    """Return a correlation with its interval, or why there is none."""
    if one.estimate is None or one.low is None or one.high is None:
        return one.not_enough or "not enough"
    return f"{one.estimate:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"


def ratio(one: Ratio) -> str:
    """Return a ratio with its interval, or why there is none."""
    return one.not_enough or interval(one.value, one.low, one.high)


def ratios(view: View) -> list[tuple[str, ...]]:
    """Return rows (name, versions, value, what it is) of the gap and of length's share."""
    return [(one.name, str(one.n), ratio(one), one.estimand) for one in (view.findings.gap, view.findings.length)]


def band(curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the 95 % interval (n,), (n,) of each mean; None without standard errors."""
    if curve.se is None:
        return None
    return curve.mean - LEVEL_Z * curve.se, curve.mean + LEVEL_Z * curve.se


def measured(view: View) -> list[tuple[str, ...]]:
    """Return rows (quantity, versions, points, prompts, median standard error) of what was measured."""
    rows = []
    curves = [("reward", view.series.reward), *(("evaluation", curve) for curve in view.series.evaluations)]
    if view.series.kl is not None:
        curves.append(("KL", view.series.kl))
    for kind, curve in curves:
        name = curve.name if curve.name.lower() == kind.lower() else f"{kind} {curve.name}"
        span = f"{curve.versions[0]} to {curve.versions[-1]}" if len(curve.versions) else "none"
        se = None if curve.se is None or not len(curve.se) else float(np.median(curve.se))
        rows.append((name, span, str(len(curve.versions)), str(curve.prompts or UNKNOWN), size(se)))
    return rows
