"""All that is said about one run, in one place: as values for Python, and as the JSON object of docs/watch.md."""

from dataclasses import asdict, dataclass
from typing import Any

from trainers.mismatch.alarm import Alarm, Settings, Verdict, judge
from trainers.mismatch.correlation import Correlation, correlate
from trainers.mismatch.series import Series


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the instrument says about one run; the chosen version and the headroom are the primary evaluation's."""

    series: Series
    verdict: Verdict
    correlations: tuple[Correlation, ...]  # over the whole run: reward and KL with each evaluation
    reasons: tuple[str, ...]  # why something is not said, and what was left out or assumed


def find(series: Series, settings: Settings | None = None, *, notes: tuple[str, ...] = ()) -> Findings:
    """Ask every part of the instrument about one run.

    `notes` are the reader's and come last among the reasons. Raises UserError as the parts do.
    """
    verdict = judge(series, settings)
    correlations = correlate(series)
    reasons = [*verdict.reasons, *_correlation_reasons(correlations), *notes]
    return Findings(series=series, verdict=verdict, correlations=correlations, reasons=tuple(dict.fromkeys(reasons)))


def to_json(findings: Findings) -> dict[str, Any]:
    """Return the documented JSON object: numbers, text, lists and None only. docs/watch.md says what each field is."""
    verdict, primary = findings.verdict, findings.series.primary
    return {
        "state": verdict.state,
        "since_version": verdict.since_version,
        "reward": findings.series.reward.name,
        "evaluation": primary.name,
        "evaluated_versions": primary.versions.tolist(),
        "false_alarm_rate": verdict.false_alarm_rate,
        "minimum_detectable_drop": verdict.primary.minimum_detectable_drop,
        "alarms": [_alarm(alarm) for alarm in (verdict.primary, *verdict.others)],
        "correlations": [asdict(one) for one in findings.correlations],
        "reasons": list(findings.reasons),
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


def _correlation_reasons(correlations: tuple[Correlation, ...]) -> list[str]:
    """Say once for each pair of curves why it has no coefficient."""
    return [f"correlation of {one.x} and {one.y}: {one.not_enough}" for one in correlations if one.not_enough]
