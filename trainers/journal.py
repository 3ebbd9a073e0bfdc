"""What a run remembers: ledger, metrics, samples, checkpoints, and the versions pinned for evaluation."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Recipe
from trainers import checkpoint, spool
from trainers.batch import disagreement, rollout_metrics
from trainers.buffer import Take
from trainers.evaluations import due_versions, milestones
from trainers.ledger import Entry, Ledger
from trainers.mismatch import Alarm, Curve, State, shortlist
from trainers.mismatch.findings import Findings
from trainers.pins import Pins, best_version
from trainers.rundir import RunDir
from trainers.tracking import Tracker
from trainers.types import Evaluation, StepStats, Weights
from trainers.watcher import UNJUDGED

log = logging.getLogger("headroom")
SPARE = 5  # versions kept for a shortlist of three: what is deleted cannot come back
SAMPLES_EVERY = 5  # versions between tables of completions


@dataclass(frozen=True, slots=True, kw_only=True)
class Hands:
    """What the journal asks the actors to do."""

    save: Callable[[str], Awaitable[None]]  # the learner's state below a directory
    export: Callable[[str], Awaitable[None]]  # the policy in HF format
    gauges: Callable[[], Awaitable[Mapping[str, float]]]  # busy times, sync, counters
    show: Callable[[int, Mapping[str, float], float | None, State | None], None]  # the progress line
    judge: Callable[[], Awaitable[Findings | None]]  # what the instrument says of the run directory as it is now
    raise_kl: Callable[[float, int, int], Awaitable[bool]]  # by a factor, at an evaluated version, once since a version
    refresh: Callable[[], None]  # begin to write the report anew, if it is time to


class RunJournal:
    """The Journal of a real run, on disk in `rundir` and in MLflow through `tracker`."""

    def __init__(
        self,
        recipe: Recipe,
        rundir: RunDir,
        tracker: Tracker,
        pins: Pins,
        hands: Hands,
        *,
        shortlisting: bool = False,
        version: int,
        position: int,
        incarnation: int,
    ) -> None:
        """Take up the run where its checkpoint left it: after step `version`, with `position` prompts retired.

        `shortlisting`: keep the weights of all versions that may be evaluated again when training ends.
        """
        self.position = position
        self._version = self._saved = version  # last recorded, and last that a kill cannot take back
        self._recipe = recipe
        self._rundir = rundir
        self._tracker = tracker
        self._hands = hands
        self._incarnation = incarnation
        self._ledger = Ledger(rundir.ledger)
        self._finished = time.monotonic()
        self._stop = asyncio.Event()
        self._asked = asyncio.Event()  # by someone outside: not by the alarm
        self._primary: dict[int, float] = {}  # version -> mean of the primary evaluation
        self._evaluated: dict[int, dict[str, float]] = {}
        self._pins = pins
        self._shortlisting = shortlisting
        self._curve: Curve | None = None  # of the primary evaluation, as last judged
        self._settled: int | None = None  # the best version, once it was evaluated again
        models = {of.name: of.weight for of in recipe.reward.components if of.model is not None}
        self._ensemble = models if len(models) > 1 else {}
        self._first = first_rewards(rundir.metrics) if version and self._ensemble else {}  # of the run's first batch
        self.latest: float | None = None
        self.state: State | None = None  # of reward and primary evaluation, as last judged

    def stop(self) -> None:
        """Ask the run to end: after the current step if one is being trained, with a checkpoint."""
        self._asked.set()
        self._stop.set()

    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    async def stopped(self) -> None:
        """Return once `stop` is called."""
        await self._stop.wait()

    async def asked(self) -> None:
        """Return once the run is asked to end by another than its alarm."""
        await self._asked.wait()

    async def suspend(self) -> None:
        """Save the last recorded step unless its checkpoint is there."""
        if self._saved != self._version:
            await self.save()

    async def record(self, take: Take, stats: StepStats, weights: Weights) -> None:
        """Append to the ledger, log the metrics, and save a checkpoint when one is due."""
        for gone in take.discarded:
            if not gone.uninformative:
                log.warning("prompt %s is discarded: %s", gone.prompt.uid, gone.reason)
        self.position += take.retired
        self._version = weights.version
        self._ledger.append(
            Entry(
                step=weights.version,
                version=weights.version,
                prompts=tuple(group.prompt.uid for group in take.groups),
                rollouts=tuple(rollout.uid for group in take.groups for rollout in group.sampled),
                discarded={gone.prompt.uid: gone.reason for gone in take.discarded},
                loss=stats.loss,
                grad_norm=stats.grad_norm,
                weights_hash=weights.hash,
                rng_hash=stats.rng_hash,
                incarnation=self._incarnation,
            )
        )
        metrics = await self._measure(take, stats, weights)
        self._tracker.log_metrics(weights.version, metrics)
        self._hands.show(weights.version, metrics, self.latest, self.state)
        if weights.version % SAMPLES_EVERY == 0 or weights.version == 1:
            self._tracker.log_samples(weights.version, sample_rows(take))
        if weights.version % self._recipe.run.checkpoint_every == 0 or weights.version == self._recipe.run.steps:
            await self.save()

    async def _measure(self, take: Take, stats: StepStats, weights: Weights) -> dict[str, float]:
        now = time.monotonic()
        seconds, self._finished = now - self._finished, now
        rollouts = [rollout for group in take.groups for rollout in group.sampled]
        metrics = rollout_metrics(take.groups, weights.version - 1)
        self._first = self._first or metrics
        apart = disagreement(rollouts, self._ensemble, self._first)
        return {
            **metrics,
            **({} if apart is None else {"reward/disagreement": apart}),
            **await self._hands.gauges(),
            **stats.metrics,
            "rollout/discarded": float(sum(not gone.uninformative for gone in take.discarded)),
            "rollout/uninformative": float(sum(gone.uninformative for gone in take.discarded)),
            "time/step": seconds,
            "throughput/samples_per_s": len(rollouts) / seconds,
            "throughput/tokens_per_s": sum(len(rollout.token_ids) for rollout in rollouts) / seconds,
        }

    async def save(self) -> None:
        """Write the checkpoint of the last recorded step, complete or not at all, and forget the older ones."""
        loop, version = asyncio.get_running_loop(), self._version

        def write(path: Path) -> None:
            asyncio.run_coroutine_threadsafe(as_coroutine(self._hands.save(str(path))), loop).result()

        meta = {
            "step": version,
            "version": version,
            "position": self.position,
            "incarnation": self._incarnation,
            "mlflow_run_id": self._tracker.run_id,
        }
        path = await asyncio.to_thread(checkpoint.save, self._rundir.checkpoints, version, write, meta)
        checkpoint.prune(self._rundir.checkpoints, keep=self._recipe.run.keep_checkpoints)
        self._saved = version
        self._tracker.log_checkpoint(path, version)

    async def pin(self, weights: Weights) -> bool:
        """Keep the weights of a due version as an HF model until it is evaluated, and after that if it is the best."""
        settings, steps = self._recipe.evaluation, self._recipe.run.steps
        every_version = any(task.at == "every" for task in settings.tasks)
        due = due_versions(steps, settings.every) if every_version else milestones(steps, settings.every)
        if not settings.tasks or weights.version not in due or weights.version in self._evaluated:
            return False
        await self._pins.keep(weights.version, self._hands.export)
        return True

    async def evaluated(self, results: Sequence[Evaluation]) -> None:
        """Log one version's evaluations; keep its weights only if it is the best so far, or may be again.

        A resume takes back what was evaluated after the checkpoint, so the best up to there stays as well. With the
        shortlist these are at most SPARE + 4 versions, besides those that wait to be evaluated (four at most).
        """
        if not results:
            return
        self._tracker.log_evaluations(results)
        self._note(results)
        self._curve = None  # until it is judged
        await self._judge()
        likely = await asyncio.to_thread(self._likely) if self._shortlisting else ()
        pending = set(self._pins.versions()) - self._evaluated.keys()
        safe = {version: score for version, score in self._primary.items() if version <= self._saved}
        last = self._recipe.run.steps
        self._pins.keep_only({*pending, last, best_version(self._primary), best_version(safe), *likely})

    def _likely(self) -> Collection[int]:
        """Return the first version and the SPARE that are most likely to be shortlisted in the end."""
        try:
            if self._curve is not None and (listed := shortlist(self._curve, SPARE, self._pins.versions())).versions:
                return listed.versions
        except UNJUDGED as error:
            log.debug("no shortlist: %s", error)
        return [*sorted(self._primary)[:1], *sorted(self._primary, key=self._primary.__getitem__)[-SPARE:]]

    def settle(self, version: int) -> None:
        """Take `version` for the best; keep its weights, and the first's and last's where training is over."""
        self._settled = version
        if not self.stopping():
            self._pins.keep_only({version, min(self._primary), self._recipe.run.steps})

    async def _judge(self) -> None:
        """Ask whether reward and primary evaluation have parted, and act on it as the recipe says."""
        if not self._primary or not self._version:
            return  # no reward has been measured before the first step
        findings = await self._hands.judge()
        if findings is None:
            return
        self._curve = findings.series.primary
        verdict = findings.verdict
        if verdict.state is not None and verdict.state != self.state:
            log.info("state: %s since version %s", verdict.state, verdict.since_version)
        self.state = verdict.state
        self._tracker.log_tags({"alarm.state": str(verdict.state), "alarm.since_version": str(verdict.since_version)})
        if verdict.primary.fallen and not self.stopping():
            await self._act(verdict.primary, int(findings.series.primary.versions[-1]))
        self._hands.refresh()

    async def _act(self, alarm: Alarm, version: int) -> None:
        """Do what the recipe says about a fall that stands at the evaluated `version`."""
        config = self._recipe.alarm
        if config.action == "stop":
            log.warning("alarm.action is stop: ending with a checkpoint")
            self._stop.set()
        elif config.action == "raise_kl" and self._version < self._recipe.run.steps:
            since = max((fall.recovered for fall in alarm.falls if fall.recovered is not None), default=0)
            if not await self._hands.raise_kl(config.kl_factor, version, since):
                return  # at an earlier evaluation of this fall
            log.warning("alarm.action is raise_kl: the KL coefficient is multiplied by %g", config.kl_factor)
        else:
            return
        self._tracker.log_tags({"alarm.action_taken": f"{config.action} on the evaluation of version {version}"})

    def recall(self, results: Mapping[int, Sequence[Evaluation]]) -> list[int]:
        """Take over an earlier incarnation's evaluations; return the versions it pinned but never evaluated."""
        for _, of_version in sorted(results.items()):
            self._note(of_version)
        return [version for version in self._pins.versions() if version not in self._evaluated]

    def _note(self, results: Sequence[Evaluation]) -> None:
        version, means = results[0].version, evaluation_means(results)
        self._evaluated[version] = means
        if self._recipe.evaluation.primary in means:
            self._primary[version] = self.latest = means[self._recipe.evaluation.primary]

    @property
    def evaluations(self) -> Mapping[int, Mapping[str, float]]:
        """Version -> `task/metric` -> mean."""
        return self._evaluated

    @property
    def best(self) -> tuple[int, Path] | None:
        """The version that is best by the primary evaluation, and its HF model."""
        version = best_version(self._primary) if self._settled is None else self._settled
        return None if version is None else (version, self._pins.path(version))


def first_rewards(path: Path) -> dict[str, float]:
    """Return the first value that counts of each metric of the reward; none where the run has lost them."""
    metrics = spool.read_metrics(path)
    return {key: points[0][1] for key, points in metrics.items() if key.startswith("reward/") and points}


async def as_coroutine(awaitable: Awaitable[None]) -> None:
    """Await anything awaitable; run_coroutine_threadsafe takes coroutines only."""
    await awaitable


def evaluation_means(results: Sequence[Evaluation]) -> dict[str, float]:
    """Return `task/metric` -> mean over the prompts."""
    return {
        f"{result.task}/{metric}": float(np.mean(scores))
        for result in results
        for metric, scores in result.scores.items()
    }


def sample_rows(take: Take, groups: int = 4) -> list[dict[str, Any]]:
    """Return one completion of each of the first groups as table rows."""
    rows: list[dict[str, Any]] = []
    for group in take.groups[:groups]:
        rollout = group.sampled[0]
        prompt = group.prompt.messages[-1]["content"] if group.prompt.messages else ""
        rows.append({"prompt": prompt, "completion": rollout.text, "reward": rollout.reward, **rollout.rewards})
    return rows
