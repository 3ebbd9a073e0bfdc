"""`headroom watch`: state and numbers of a run, whoever trained it, again whenever new points arrive."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from configs.errors import UserError
from trainers.measured import Columns, MeasuredRun
from trainers.mismatch import Correlation, Curve, Settings
from trainers.mismatch.early import Early
from trainers.mismatch.findings import Findings, to_json
from trainers.mismatch.gap import Ratio
from trainers.mismatch.headroom import Headroom
from trainers.mismatch.selection import Selected
from trainers.rundir import content_hash
from trainers.sources import read
from trainers.types import InfraError
from trainers.watcher import judge_run

MEANINGS = {
    "aligned": "the evaluation is not shown to have fallen",
    "flattening": "the evaluation has stopped rising; no false-alarm rate stands behind this",
    "parted": "the reward rose, the evaluation fell",
    "decayed": "the evaluation fell, the reward is not shown to have moved",
    "broken": "both fell",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What was asked for on the command line."""

    source: str
    columns: Columns
    tracking_uri: str | None = None
    settings: Settings = Settings()
    kl_budget: float | None = None  # nats
    version_budget: int | None = None
    as_json: bool = False
    every_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.every_s > 0:
            raise UserError(f"--every {self.every_s:g}: it must be above 0 seconds")


def once(watch: Watch) -> None:
    """Print what there is now. Raises UserError and InfraError as `trainers.sources.read` does."""
    _show(watch, _read(watch))


def follow(watch: Watch, wait: Callable[[float], None] = time.sleep) -> NoReturn:
    """Print what there is now, and again after each wait that brought something new; return never.

    A source that cannot be read at first is an error, as in `once`; later it is a warning, if two looks in a row meet
    the same trouble: whoever writes the source may be in the middle of a line.
    """
    run = _read(watch)
    _show(watch, run)
    known, trouble, told = _fingerprint(run), "", ""
    while True:
        wait(watch.every_s)
        try:
            run = _read(watch)
        except (UserError, InfraError) as error:
            if str(error) == trouble != told:
                print(f"headroom: warning: {trouble}; still watching", file=sys.stderr, flush=True)
                told = trouble
            trouble = str(error)
            continue
        trouble = told = ""
        if (now := _fingerprint(run)) != known:
            known = now
            _show(watch, run)


def _read(watch: Watch) -> MeasuredRun:
    return read(watch.source, watch.columns, watch.tracking_uri)


def _show(watch: Watch, run: MeasuredRun) -> None:
    findings = judge_run(run, watch.settings, kl_budget=watch.kl_budget, version_budget=watch.version_budget)
    print(json.dumps(to_json(findings), allow_nan=False) if watch.as_json else page(run, findings), flush=True)


def _fingerprint(run: MeasuredRun) -> str:
    """Tell readings apart by all the numbers that anything is said of."""
    final = () if run.final is None else (run.final.again, run.final.untouched)
    curves = (run.series.reward, run.series.kl, *run.series.evaluations, *final)
    return content_hash([_numbers(curve) for curve in curves if curve is not None])


def _numbers(curve: Curve) -> list[Any]:
    return [curve.versions.tolist(), curve.mean.tolist(), None if curve.se is None else curve.se.tolist()]


def page(run: MeasuredRun, findings: Findings) -> str:
    """Return what a terminal shows of one reading."""
    verdict, primary = findings.verdict, findings.series.primary
    count = len(primary.versions)
    spread = f"versions {primary.versions[0]} to {primary.versions[-1]}" if count else "no version yet"
    lines = [f"{time.strftime('%H:%M:%S')} {run.name}: {count} evaluations by {primary.name}, {spread}"]
    state = "not enough" if verdict.state is None else f"{verdict.state} since version {verdict.since_version}"
    rows = [("state", state + (f": {MEANINGS[verdict.state]}" if verdict.state else ""))]
    rows += [("chosen", _chosen(findings.selected)), ("headroom", _headroom(findings.headroom))]
    rivals = [f"{one.rule} {one.version}" for one in findings.rivals if one.version is not None]
    if rivals:
        rows.append(("rivals", f"versions by simpler rules: {', '.join(rivals)}"))
    drop = verdict.primary.minimum_detectable_drop
    if drop is not None:
        rate = f"false alarms in at most {verdict.false_alarm_rate:.0%} of runs"
        rows.append(("detectable drop", f"{drop:.3g} of {primary.name}; {rate}"))
    rows += [(f"also {a.evaluation}", "fallen" if a.fallen else "not shown to have fallen") for a in verdict.others]
    rows += [(curve.name, _latest(curve)) for curve in (findings.series.reward, *findings.series.evaluations)]
    rows += [("correlation", text) for text in _correlations(findings.correlations)]
    rows += [("gap", _gap(findings)), ("length", _ratio(findings.length, findings.length.name))]
    rows += [(f"early: {one.kind}", _early(one)) for one in findings.early]
    rows += [("note", reason) for reason in findings.reasons]
    width = max(len(label) for label, _ in rows)
    return "\n".join([*lines, *(f"  {label.ljust(width)}  {text}" for label, text in rows), ""])


def _chosen(selected: Selected) -> str:
    if selected.version is None or selected.value is None or selected.gain is None:
        return "not enough"
    value, gain = (f"{one.value:+.3g} [{one.low:+.3g}, {one.high:+.3g}]" for one in (selected.value, selected.gain))
    fresh = ", on prompts that nothing was chosen on" if selected.source == "untouched" else ""
    return f"version {selected.version}: {value}, {gain} over version {selected.base}{fresh}"


def _headroom(headroom: Headroom) -> str:
    if headroom.answer == "interval":
        return f"{headroom.low:+.3g} to {headroom.high:+.3g}: {headroom.estimand}"
    bound = {"at least": headroom.low, "at most": headroom.high}.get(headroom.answer)
    number = "" if bound is None else f" {bound:+.3g}"
    return f"{headroom.answer}{number}: {headroom.estimand}"


def _gap(findings: Findings) -> str:
    reward, gold = findings.series.reward.name, findings.series.primary.name
    return _ratio(findings.gap, f"1, {gold} gains in step with {reward}; below 0, it loses")


def _ratio(one: Ratio, of: str) -> str:
    return "not enough" if one.value is None else f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]: {of}"


def _early(one: Early) -> str:
    """Say whether a quantity is warned of, how often that is wrong, and its values."""
    if one.warned is None:
        return f"{one.not_enough or 'no warning'}; {one.curve.name} {_latest(one.curve)}"
    rate = f"false in at most {100 * one.false_warning_rate:.2g} % of runs"
    return f"warning at version {one.warned}, {rate}; {one.curve.name} {_latest(one.curve)}"


def _latest(curve: Curve) -> str:
    if not len(curve.versions):
        return "not measured yet"
    error = "" if curve.se is None else f" ± {curve.se[-1]:.2g}"
    return f"{curve.mean[0]:+.4g} at version {curve.versions[0]}, {curve.mean[-1]:+.4g}{error} at {curve.versions[-1]}"


def _correlations(correlations: tuple[Correlation, ...]) -> list[str]:
    """One line for each pair of curves that has coefficients."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for one in correlations:
        if one.estimate is not None:
            text = f"{one.kind} {one.estimate:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
            pairs.setdefault((one.x, one.y), []).append(text)
    return [f"{x} with {y}: {', '.join(texts)}" for (x, y), texts in pairs.items()]
