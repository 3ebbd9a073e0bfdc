"""From a run that was read to what its report shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.report.view import Sample, View, Warned, percent
from trainers.measured import MeasuredRun
from trainers.mismatch import Settings, correlate
from trainers.mismatch.correlation import WINDOW
from trainers.mismatch.early import Early
from trainers.watcher import judge_run

SHOWN_SAMPLES = 8


def build(
    run: MeasuredRun,
    settings: Settings | None = None,
    *,
    kl_budget: float | None = None,
    version_budget: int | None = None,
) -> View:
    """Ask the instrument about a run, as `judge_run` does, and gather what a report of it shows.

    Raises UserError as the instrument does.
    """
    findings = judge_run(run, settings, kl_budget=kl_budget, version_budget=version_budget)
    return View(
        name=run.name,
        findings=findings,
        windows=correlate(run.series, window=WINDOW, draws=200) if len(run.series.primary.versions) > WINDOW else (),
        warnings=tuple(map(_warned, findings.early)),
        samples=_side_by_side(run.samples, findings.selected.version),
        params=run.params,
        evaluation_hash=run.evaluation_hash,
        seconds=run.seconds,
    )


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
