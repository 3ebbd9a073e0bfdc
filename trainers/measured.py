"""One run as the instrument sees it, whoever trained it: which of its columns are what, and the curves they make."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from configs.errors import UserError
from trainers.mismatch import Answers, Curve, Final, Series, from_means, from_records, from_table
from trainers.mismatch.alarm import FEWEST
from trainers.mismatch.series import MOST_MEASURED
from trainers.mismatch.sources import Table, is_scores
from trainers.rundir import content_hash
from trainers.types import Evaluation

Kind = Literal["entropy", "length", "truncation", "repetition", "reward spread", "reward tail", "ensemble disagreement"]
Points = Sequence[tuple[int, float]]  # (policy version, value)

REWARD, KL, VERSION = ("reward/mean", "reward"), ("kl/reference", "kl"), ("version", "step")
SHOWN_COLUMNS = 20
EVALUATION_TAG = "config.evaluation"  # hash of the recipe's section; every run of Headroom has it
# What may show over-optimisation before an evaluation does, by the names of Headroom and of TRL.
EARLY: Mapping[str, Kind] = {
    "policy/entropy": "entropy",
    "entropy": "entropy",
    "rollout/length_mean": "length",
    "completions/mean_length": "length",
    "length": "length",
    "words": "length",
    "rollout/truncated_fraction": "truncation",
    "completions/clipped_ratio": "truncation",
    "repetition": "repetition",
    "distinct": "repetition",
    "reward/std": "reward spread",
    "reward_std": "reward spread",
    "reward/tail": "reward tail",
    "reward/disagreement": "ensemble disagreement",
}
# Lengths of the very answers that the reward is the mean of: they share its errors, and those would count as bought.
OWN_LENGTHS = ("rollout/length_mean", "completions/mean_length")
# Metrics that describe answers, or are the proxy itself: more of them is not better.
NOT_QUALITY = ("length", "words", "repetition", "distinct", "refusal", "reward")
PROXY = "reward"  # a metric of this name scores what the policy is trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns (metrics, `task/metric`) are what; None or empty: found by name, see `trainers.sources.read`."""

    reward: str | None = None
    evaluations: tuple[str, ...] = ()  # the first is the primary one
    kl: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyWarning:
    """A curve that may move before the evaluations do; `curve.name` is its name in the source."""

    kind: Kind
    curve: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One run with everything the instrument can use of it."""

    name: str  # of the run; of a file its stem
    source: str  # what `trainers.sources.read` finds it by again: a path, or mlflow:RUN_ID
    series: Series
    planned: int | None = None  # versions that the primary evaluation will have in the end; None: not known
    final_version: int | None = None  # that the recipe trains to; None: not known
    params: Mapping[str, str] = field(default_factory=dict)  # "algorithm.kl.coefficient": "0.02"; secrets are masked
    evaluation_hash: str | None = None  # equal: evaluated in the same way on the same prompts; None: not known
    early_warnings: tuple[EarlyWarning, ...] = ()
    answers: Answers | None = None  # reward and length of the same prompts, where both were scored
    prompt_seconds: float | None = None  # that the evaluator took for one prompt; None: not known
    # version -> samples of the primary evaluation's task: prompt, completion, and each metric's score by its name
    samples: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    final: Final | None = None  # what was evaluated when training ended, by the primary evaluation
    seconds: float | None = None  # spent on it so far; None: not known
    notes: tuple[str, ...] = ()  # what was found by name and could be chosen otherwise

    @property
    def length(self) -> Curve | None:
        """The length that the reward may have bought."""
        lengths = (one.curve for one in self.early_warnings if one.kind == "length")
        return next((curve for curve in lengths if curve.name not in OWN_LENGTHS), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """What a run of Headroom left, in its directory or in MLflow."""

    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, Points]
    records: Mapping[int, Sequence[Evaluation]]  # by version
    # last version of the curve -> sample -> the same of what was evaluated after that curve
    final: Mapping[int, Mapping[str, Mapping[int, Sequence[Evaluation]]]] = field(default_factory=dict)


def choose(columns: Columns, names: Sequence[str], recognised: Sequence[str], where: str) -> Columns:
    """Name every column, by `columns` or else by the usual names; `recognised` are evaluations if none is given.

    Raises UserError, with the columns that there are, for one that is not there or cannot be guessed.
    """
    options = {"--reward": columns.reward, "--kl": columns.kl, "--version": columns.version}
    for option, name in [*options.items(), *(("--eval", name) for name in columns.evaluations)]:
        if name is not None and name not in names:
            raise UserError(f"{where}: {option}: there is no column {name}: the columns are {_listed(names)}")
    reward = columns.reward or _known("reward", "--reward", REWARD, names, where)
    version = columns.version or _known("version", "--version", VERSION, names, where)
    kl = columns.kl or next((name for name in KL if name in names), None)
    taken = (reward, version, kl)
    evaluations = columns.evaluations or tuple(name for name in recognised if name not in taken)
    if not evaluations:
        rest = [name for name in names if name not in taken and not name.endswith("_se")]
        if not rest:
            raise UserError(f"{where}: no evaluations: the columns are {_listed(names)}")
        raise UserError(f"{where}: which column is the evaluation? name it with --eval: there are {_listed(rest)}")
    return Columns(reward=reward, evaluations=evaluations, kl=kl, version=version)


def recognise(names: Sequence[str], with_scores: Sequence[str] = ()) -> list[str]:
    """Return which columns are evaluations: `eval/…`, or else those with standard errors or per-prompt scores.

    Of the latter `eval_rewards/…`, if there are any: TRL has the same of training, and of the sum of its rewards.
    """
    values = [name for name in names if not name.endswith("_se")]
    known = [name for name in values if f"{name}_se" in names or name in with_scores]
    evaluated = [name for name in values if name.startswith("eval/")]
    return evaluated or [name for name in known if name.startswith("eval_rewards/")] or known


def early_columns(names: Sequence[str]) -> dict[str, Kind]:
    """Return the columns that are early warnings, by their name or the last part of it."""
    kinds = {name: EARLY.get(name) or EARLY.get(name.rpartition("/")[2]) for name in names}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def from_columns(name: str, source: str, table: Table, columns: Columns, chosen: Columns) -> MeasuredRun:
    """Build a run from a table, one row a version. Raises UserError naming the source and what is wrong in it."""
    version = chosen.version or ""
    try:
        series = from_table(
            table, reward=chosen.reward or "", evaluations=chosen.evaluations, kl=chosen.kl, version=version
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    versions = [int(float(cell)) for cell in table[version]]
    return MeasuredRun(
        name=name,
        source=source,
        series=series,
        early_warnings=tuple(
            EarlyWarning(kind=kind, curve=_defined(column, zip(versions, map(_mean, table[column]), strict=True)))
            for column, kind in early_columns([*table]).items()
            if column not in chosen.evaluations
        ),
        answers=_listed_answers(table, chosen, versions),
        notes=_notes(columns, chosen),
    )


def from_headroom(name: str, source: str, logged: Logged, columns: Columns) -> MeasuredRun:
    """Build a run of Headroom from what it logged: evaluations are paired by prompt, reward and KL are metrics.

    Raises UserError naming the source and what is wrong in it.
    """
    if columns.version is not None:
        raise UserError(f"{source}: --version {columns.version}: in a run of Headroom it is the policy version")
    lost = _lost(logged)
    if not logged.records and lost:
        raise UserError(f"{source}: the records of all evaluated versions ({_listed([*map(str, lost)])}) are missing")
    if not logged.records:
        raise UserError(f"{source}: no evaluations so far; evaluation.tasks of the recipe says what is evaluated")
    scored = list(dict.fromkeys(key for results in logged.records.values() for key in _keys(results)))
    metrics = sorted(key for key in logged.metrics if not key.startswith(("eval/", "system/")))
    primary = logged.params.get("evaluation.primary")
    quality = [key for key in scored if key.rpartition("/")[2] not in NOT_QUALITY and key != primary]
    columns = replace(columns, evaluations=tuple(key.removeprefix("eval/") for key in columns.evaluations))
    recognised = [primary, *quality] if primary in scored else quality
    chosen = choose(columns, ["version", *metrics, *scored], [key for key in recognised if key], source)
    kinds = early_columns([*metrics, *scored])
    named = [key for key in (chosen.reward, chosen.kl, *chosen.evaluations) if key is not None]
    try:
        paired = from_records(_only(logged.records, {*named, *kinds}), reward=from_means("", [], [], None))
        curves = {curve.name: curve for curve in paired.evaluations}
        curves |= {key: _defined(key, logged.metrics[key]) for key in kinds if key in metrics}
        curves |= {key: _with_errors(key, logged.metrics) for key in named if key in metrics}
        final = _final(logged, curves[primary]) if primary == chosen.evaluations[0] else None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    first, due = chosen.evaluations[0], _due(logged.params)
    return MeasuredRun(
        name=name,
        source=source,
        series=Series(
            reward=curves[chosen.reward or ""],
            kl=None if chosen.kl is None else curves[chosen.kl],
            evaluations=tuple(curves[key] for key in chosen.evaluations),
        ),
        planned=_planned(due, curves[first]),
        final_version=due[-1] if due else None,
        params=logged.params,
        evaluation_hash=_evaluation_hash(logged),
        early_warnings=tuple(
            EarlyWarning(kind=kind, curve=curves[key]) for key, kind in kinds.items() if key not in chosen.evaluations
        ),
        answers=_answers(logged.records, first.rpartition("/")[0]),
        prompt_seconds=_prompt_seconds(logged),
        samples=_samples(logged.records, task=first.rpartition("/")[0]),
        final=final,
        seconds=math.fsum(value for _, value in logged.metrics.get("time/step", ())),
        notes=(
            *(() if primary in scored else _notes(columns, chosen)),
            *(f"version {version} left out: it was evaluated, its record is missing" for version in lost),
        ),
    )


def primary_curve(records: Mapping[int, Sequence[Evaluation]], name: str) -> Curve:
    """Return one evaluation of a run's records. Raises UserError as `from_records` does."""
    return from_records(_only(records, {name}), reward=from_means("", [], [], None), primary=name).primary


def _final(logged: Logged, curve: Curve) -> Final | None:
    """Return what was evaluated after this very curve; a run that went on since then, or lost a record, has another."""
    found = logged.final.get(int(curve.versions[-1]), {}) if len(curve.versions) else {}
    whole = found.get("again") and found.get("untouched")
    if not whole or not set(found["again"]) <= set(curve.versions.tolist()):
        return None
    return Final(**{part: primary_curve(found[part], curve.name) for part in ("again", "untouched")})


def _known(what: str, option: str, usual: Sequence[str], names: Sequence[str], where: str) -> str:
    for name in usual:
        if name in names:
            return name
    raise UserError(f"{where}: which column is the {what}? name it with {option}: the columns are {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return ", ".join(names[:SHOWN_COLUMNS]) + more


def _notes(columns: Columns, chosen: Columns) -> tuple[str, ...]:
    count = len(chosen.evaluations)
    if columns.evaluations or count == 1:
        return ()
    return (f"{chosen.evaluations[0]} is taken for the primary evaluation, the first of {count}: choose with --eval",)


def _keys(results: Sequence[Evaluation]) -> list[str]:
    return [f"{result.task}/{metric}" for result in results for metric in result.scores]


def _only(records: Mapping[int, Sequence[Evaluation]], used: set[str]) -> dict[int, list[Evaluation]]:
    """Leave out metrics that nobody asked for: what is wrong with them is no reason to refuse."""
    return {
        version: [
            replace(result, scores={m: s for m, s in result.scores.items() if f"{result.task}/{m}" in used})
            for result in results
        ]
        for version, results in records.items()
    }


def _lost(logged: Logged) -> list[int]:
    """Return the versions whose evaluations were logged as metrics, but left no record."""
    logs = (points for key, points in logged.metrics.items() if key.startswith("eval/"))
    return sorted({version for points in logs for version, _ in points} - set(logged.records))


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [version for version, _ in points], [value for _, value in points]


def _mean(cell: Any) -> float:
    """Return a cell's number, the mean of its defined scores, or NaN."""
    numbers = [_mean(score) for score in cell] if is_scores(cell) else []
    if defined := [number for number in numbers if math.isfinite(number)]:
        return math.fsum(defined) / len(defined)
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def _defined(name: str, points: Iterable[tuple[int, float]]) -> Curve:
    return from_means(name, *_columns([point for point in points if math.isfinite(point[1])]), None)


def _with_errors(name: str, metrics: Mapping[str, Points]) -> Curve:
    """Return the curve of a metric; with standard errors if `<name>_se` was logged at each of its versions.

    An error of 0, where all prompts of a batch have one mean, is kept: without it the others would say that chance adds
    more to the curve than it does.
    """
    versions, means = _columns(metrics[name])
    errors = dict(metrics.get(f"{name}_se", ()))
    curve = from_means(name, versions, means, None)
    known = [errors[version] for version in versions if version in errors]
    if not known:
        return curve
    if len(known) < len(versions) or len(known) > MOST_MEASURED:
        why = f"{len(known)} of {len(versions)} versions have one, all must, and {MOST_MEASURED:,} at most"
        return replace(curve, notes=(f"no standard error is used: {why}",))
    return replace(curve, covariance=np.diag(np.square(known)))


def _due(params: Mapping[str, str]) -> list[int]:
    """Return the versions that the recipe has evaluated; none if it does not say."""
    try:
        steps, every = int(params["run.steps"]), int(params["evaluation.every"])
    except (KeyError, ValueError):
        return []
    return sorted({*range(0, steps, every), steps})


def _planned(due: Sequence[int], primary: Curve) -> int | None:
    """Count them, if the primary evaluation has kept to them so far: a task may be due less often."""
    kept = due[: len(primary.versions)] == primary.versions.tolist()
    return len(due) if kept and len(due) >= FEWEST else None


def _evaluation_hash(logged: Logged) -> str | None:
    """Hash the recipe's evaluation section with the prompts that it led to."""
    if EVALUATION_TAG not in logged.tags:
        return None
    first = logged.records[min(logged.records)]
    prompts = {result.task: sorted({str(sample.get("prompt")) for sample in result.samples}) for result in first}
    return content_hash([logged.tags[EVALUATION_TAG], prompts])[:12]


def _samples(records: Mapping[int, Sequence[Evaluation]], task: str) -> dict[int, Sequence[Mapping[str, Any]]]:
    return {version: r.samples for version, results in sorted(records.items()) for r in results if r.task == task}


def _answers(records: Mapping[int, Sequence[Evaluation]], primary: str) -> Answers | None:
    """Return reward and length of a task that scores both by these names: the primary evaluation's, or the first."""
    found: dict[str, list[Evaluation]] = {}
    for _, results in sorted(records.items()):
        for result in results:
            if PROXY in result.scores and _length(result.scores) is not None:
                found.setdefault(result.task, []).append(result)
    if not found:
        return None
    task = min(found, key=lambda name: name != primary)
    first, length = found[task][0], _length(found[task][0].scores) or ""
    same = [one for one in found[task] if one.prompt_uids == first.prompt_uids and length in one.scores]
    rewards, lengths = (np.stack([one.scores[name].astype(np.float64) for one in same]) for name in (PROXY, length))
    return Answers(
        reward=f"{task}/{PROXY}",
        length=f"{task}/{length}",
        versions=np.array([one.version for one in same]),
        rewards=rewards,
        lengths=lengths,
    )


def _listed_answers(table: Table, chosen: Columns, versions: Sequence[int]) -> Answers | None:
    """The same from a table whose reward and length are lists of scores."""
    reward, length = chosen.reward or "", _length([name for name in table if name not in chosen.evaluations])
    if length is None:
        return None
    rows = zip(versions, table[reward], table[length], strict=True)
    listed = [(at, r, n) for at, r, n in rows if is_scores(r) and is_scores(n) and len(r) == len(n)]
    if not listed:
        return None
    return Answers(
        reward=reward,
        length=length,
        versions=np.array([version for version, _, _ in listed]),
        rewards=np.array([[_mean(score) for score in cell] for _, cell, _ in listed]),
        lengths=np.array([[_mean(score) for score in cell] for _, _, cell in listed]),
    )


def _length(names: Iterable[str]) -> str | None:
    return next((name for name, kind in early_columns([*names]).items() if kind == "length"), None)


def _prompt_seconds(logged: Logged) -> float | None:
    """Divide the time of the evaluations that had ended by the last step by their prompts, of all tasks alike.

    The evaluator's time is logged when an evaluation has ended, so each reading above 0 is one evaluation.
    """
    points = (of for key, of in logged.metrics.items() if key.startswith("time/evaluator") and key.endswith("_busy"))
    busy = [seconds for of in points for _, seconds in of if seconds > 0]
    evaluated = sorted(logged.records)[: len(busy)]
    prompts = sum(len(result.prompt_uids) for version in evaluated for result in logged.records[version])
    return math.fsum(busy) / prompts if prompts else None
