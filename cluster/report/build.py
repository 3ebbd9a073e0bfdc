"""From a run that was read to what its report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.report.view import Choice, Estimate, Sample, View, Warned, percent
from trainers.measured import MeasuredRun
from trainers.mismatch import Settings, correlate, selection
from trainers.mismatch.correlation import WINDOW
from trainers.mismatch.early import Early
from trainers.mismatch.headroom import Headroom
from trainers.watcher import judge_run

SHOWN_SAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How far headroom looks; neither: to the recipe's last version, or half as many versions again."""

    version: int | None = None
    kl: float | None = None  # nats; also the KL that the rule "KL budget" allows


def build(run: MeasuredRun, settings: Settings | None = None, budget: Budget | None = None) -> View:
    """Ask the instrument about a run, and gather what a report of it shows.

    The plan of the run's own recipe counts where `settings` has none. Raises UserError as the instrument does.
    """
    budget = budget or Budget()
    found = judge_run(run, settings, kl_budget=budget.kl, version_budget=budget.version)
    chosen, room = _chosen(found.selected), found.headroom
    on_cards = (f"chosen version: {chosen.note}", f"headroom: {room.reason}")
    return View(
        name=run.name,
        series=run.series,
        verdict=found.verdict,
        correlations=found.correlations,
        chosen=chosen,
        rivals=_rivals(found.rivals, run.series.primary.name),
        headroom=_left(room),
        no_headroom=room.reason or "",
        windows=correlate(run.series, window=WINDOW, draws=200) if len(run.series.primary.versions) > WINDOW else (),
        warnings=tuple(map(_warned, found.early)),
        samples=_side_by_side(run.samples, chosen.version),
        params=run.params,
        evaluation_hash=run.evaluation_hash,
        seconds=run.seconds,
        notes=tuple(reason for reason in found.reasons if reason not in on_cards),
    )


def _chosen(found: selection.Selected) -> Choice:
    of, _, of_gain = found.estimand.partition("; gain: ")
    fresh = found.source == "untouched"
    return Choice(
        rule="chosen: best of the smoothed curve" + (", re-evaluated" if fresh else ""),
        version=found.version,
        value=_estimate(found.value, of),
        gain=_estimate(found.gain, of_gain),
        note=found.not_enough or found.note or ("Measured on prompts that nothing was chosen on" if fresh else ""),
    )


def _rivals(rivals: Sequence[selection.Rival], name: str) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            rule=one.rule,
            version=one.version,
            value=_estimate(one.value, f"true mean of {name} at version {one.version}"),
            gain=_estimate(one.gain, ""),
            note=one.not_enough or one.note or "",
        )
        for one in rivals
    )


def _estimate(found: selection.Estimate | None, of: str) -> Estimate | None:
    return None if found is None else Estimate(value=found.value, low=found.low, high=found.high, of=of)


def _left(room: Headroom) -> Estimate:
    of = f"{percent(room.level)} interval of {room.estimand}"
    return Estimate(value=None, low=room.low, high=room.high, of=of)


def _warned(early: Early) -> Warned:
    curve = early.curve
    if not len(curve.versions):
        says = "not measured yet"
    else:
        first, last = (f"{curve.mean[place]:.4g} at version {curve.versions[place]}" for place in (0, -1))
        warning = "no warning" if early.warned is None else f"warning at version {early.warned}"
        says = f"{early.not_enough or warning}; {early.kind}: {first}, {last}"
    rate = "nothing is said" if early.not_enough else f"at most {percent(early.false_warning_rate)} of runs"
    return Warned(curve=curve, says=says, error_rate=rate)


def _side_by_side(samples: Mapping[int, Sequence[Mapping[str, Any]]], chosen: int | None) -> tuple[Sample, ...]:
    """Put the completions of the same prompts by the first, the chosen and the last version beside each other."""
    if not samples:
        return ()
    versions = sorted({min(samples), max(samples), *({chosen} & samples.keys())})
    by_prompt: dict[str, dict[int, str]] = {}
    for version in versions:
        for sample in samples[version]:
            by_prompt.setdefault(str(sample.get("prompt")), {}).setdefault(version, str(sample.get("completion")))
    shared = [
        Sample(prompt=prompt, completions=found) for prompt, found in by_prompt.items() if len(found) == len(versions)
    ]
    return tuple(shared[:SHOWN_SAMPLES])
