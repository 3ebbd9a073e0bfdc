"""All that is said about one run, in one place: as values for Python, and as the JSON object of docs/watch.md."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import UserError
from trainers.mismatch.alarm import Alarm, Settings, Verdict, judge
from trainers.mismatch.correlation import Correlation, correlate
from trainers.mismatch.early import Early, warn
from trainers.mismatch.gap import Answers, Ratio, proxy_gold_gap, share_of_length
from trainers.mismatch.headroom import Headroom, headroom_within
from trainers.mismatch.selection import Estimate, Final, Rival, Selected, choose, report, rivals
from trainers.mismatch.series import Curve, Series


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the instrument says about one run; what is chosen and the headroom are the primary evaluation's."""

    series: Series
    verdict: Verdict
    selected: Selected  # its source says whether anything was evaluated again for it
    rivals: tuple[Rival, ...]  # what simpler rules would have chosen
    headroom: Headroom
    gap: Ratio  # of reward and primary evaluation, since the first version
    length: Ratio  # its share of the rise of the reward
    correlations: tuple[Correlation, ...]  # over the whole run: reward and KL with each evaluation
    reasons: tuple[str, ...]  # why something is not said, and what was left out or assumed
    early: tuple[Early, ...] = ()  # warnings that need no evaluation, apart from the state


def find(
    series: Series,
    settings: Settings | None = None,
    *,
    kl_budget: float | None = None,
    version_budget: int | None = None,
    final: Final | None = None,
    notes: tuple[str, ...] = (),
    early: Sequence[tuple[str, Curve]] = (),
    answers: Answers | None = None,
    length: Curve | None = None,
) -> Findings:
    """Ask every part of the instrument about one run.

    The headroom is that within `kl_budget` (nats) or up to `version_budget`; of neither, up to half as many versions
    again as lie behind. `final`: what was evaluated after the primary evaluation's curve, to choose a version and to
    value it; without it both come from the curve. `notes` are the reader's and come last among the reasons. `early`:
    kind and curve of what may move before an evaluation does. `length`: what the reward may have bought, if `answers`
    do not tell; not of the reward's own rollouts, whose errors both would share. Raises UserError as the parts do.
    """
    settings = settings or Settings()
    if kl_budget is not None and version_budget is not None:
        raise UserError("give one budget: a KL or a version")
    if kl_budget is not None and not 0 < kl_budget < math.inf:
        raise UserError(f"a KL budget of {kl_budget:g} nats: it must be a number above 0")
    if kl_budget is None and version_budget is None:
        version_budget = _half_again(series)
    verdict = judge(series, settings)
    again, untouched = (None, None) if final is None else (final.again, final.untouched)
    selected = report(choose(series.primary, again), untouched)
    headroom = headroom_within(series, kl=kl_budget, version=version_budget)
    correlations = correlate(series)
    gap, bought = proxy_gold_gap(series), share_of_length(series, answers, length)
    reasons = [
        *verdict.reasons,
        *_reasons("chosen version", selected.not_enough, selected.note),
        *_reasons("headroom", headroom.reason, *(note for note in headroom.notes if note not in series.primary.notes)),
        *(f"correlation of {one.x} and {one.y}: {one.not_enough}" for one in correlations if one.not_enough),
        *(f"{one.name}: {one.not_enough}" for one in (gap, bought) if one.not_enough),
        *notes,
    ]
    return Findings(
        series=series,
        verdict=verdict,
        selected=selected,
        rivals=rivals(series, kl_budget=kl_budget, fresh=untouched),
        headroom=headroom,
        gap=gap,
        length=bought,
        correlations=correlations,
        reasons=tuple(dict.fromkeys(reasons)),
        early=warn(
            early,
            series.primary.versions,
            alpha=settings.alpha,
            planned=settings.planned,
            runs=settings.runs,
            seed=settings.seed,
        ),
    )


def to_json(findings: Findings) -> dict[str, Any]:
    """Return the documented JSON object: numbers, text, lists and None only. docs/watch.md says what each field is."""
    verdict, primary, selected = findings.verdict, findings.series.primary, findings.selected
    headroom = findings.headroom
    return {
        "state": verdict.state,
        "since_version": verdict.since_version,
        "reward": findings.series.reward.name,
        "evaluation": primary.name,
        "evaluated_versions": primary.versions.tolist(),
        "chosen_version": selected.version,
        "chosen_value": _estimate(selected.value, selected),
        "chosen_gain": _estimate(selected.gain, selected),
        "rivals": [{"rule": one.rule, "version": one.version, "not_enough": one.not_enough} for one in findings.rivals],
        "headroom": {
            "answer": headroom.answer,
            "low": headroom.low,
            "high": headroom.high,
            "level": headroom.level,
            "estimand": headroom.estimand,
            "reason": headroom.reason,
        },
        "false_alarm_rate": verdict.false_alarm_rate,
        "minimum_detectable_drop": verdict.primary.minimum_detectable_drop,
        "proxy_gold_gap": asdict(findings.gap),
        "length_share": asdict(findings.length),
        "alarms": [_alarm(alarm) for alarm in (verdict.primary, *verdict.others)],
        "correlations": [asdict(one) for one in findings.correlations],
        "early_warnings": [_early(one) for one in findings.early],
        "reasons": list(findings.reasons),
    }


def _half_again(series: Series) -> int:
    versions = series.primary.versions
    return int(versions[-1]) + max(1, math.ceil((versions[-1] - versions[0]) / 2)) if len(versions) else 1


def _reasons(about: str, *why: str | None) -> list[str]:
    return [f"{about}: {one}" for one in why if one]


def _estimate(estimate: Estimate | None, selected: Selected) -> dict[str, Any] | None:
    return None if estimate is None else {**asdict(estimate), "level": selected.level, "sample": selected.source}


def _early(one: Early) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "quantity": one.curve.name,
        "warned_version": one.warned,
        "false_warning_rate": one.false_warning_rate,
        "not_enough": one.not_enough,
    }


def _alarm(alarm: Alarm) -> dict[str, Any]:
    return {
        "evaluation": alarm.evaluation,
        "raised": alarm.raised,
        "false_alarm_rate": alarm.alpha,
        "margin": alarm.margin,
        "minimum_detectable_drop": alarm.minimum_detectable_drop,
        "falls": [
            {"since_version": fall.since, "raised_version": fall.raised, "recovered_version": fall.recovered}
            for fall in alarm.falls
        ],
        "not_enough": alarm.not_enough,
    }
