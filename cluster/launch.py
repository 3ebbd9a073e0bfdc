"""The composition root: from a recipe to running actors, a finished run and what it leaves behind."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.weight_sync import weights_from_directory
from cluster.cast import Cast, start_cast
from cluster.placement import Placement
from cluster.progress import Progress
from configs.schema import Recipe
from trainers import checkpoint
from trainers.buffer import Buffer
from trainers.journal import Hands, RunJournal
from trainers.ledger import Ledger
from trainers.online import Actors, run
from trainers.pins import Pins
from trainers.rundir import RunDir
from trainers.tracking import Tracker

log = logging.getLogger("headroom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a run leaves behind."""

    rundir: RunDir
    best: tuple[int, Path] | None  # version that is best by the primary evaluation, and its HF model
    evaluations: Mapping[int, Mapping[str, float]]  # version -> task/metric -> mean
    version: int
    mlflow_run_id: str | None
    seconds: float


def train(recipe: Recipe, resume: str | None = None) -> Finished:
    """Run `recipe`, or continue it if its run directory (or `resume`) holds a checkpoint.

    Raises UserError for what the user can mend, InfraError when the machines failed.
    """
    rundir = RunDir(Path(resume or recipe.run.dir.format(name=recipe.run.name))).create()
    with rundir.lock():
        rundir.adopt_config(recipe.model_dump(mode="json"))
        connect(recipe)
        try:
            return asyncio.run(_train(recipe, rundir))
        except BaseExceptionGroup as group:
            raise first_cause(group) from group
        finally:
            ray.shutdown()


def connect(recipe: Recipe) -> None:
    """Start a private Ray on this machine, or join the one at ray.address."""
    variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    local = recipe.ray.address == "local"
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets the driver starve the engines on a small machine
    ray.init(
        address=recipe.ray.address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables},
        **({"num_cpus": os.cpu_count(), "include_dashboard": False} if local else {}),
    )


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first single exception inside nested groups."""
    cause = group.exceptions[0]
    return first_cause(cause) if isinstance(cause, BaseExceptionGroup) else cause


async def _train(recipe: Recipe, rundir: RunDir) -> Finished:
    began = time.monotonic()
    found = checkpoint.find_latest(rundir.checkpoints)
    meta: Mapping[str, Any] = found[1] if found else {"version": 0, "position": 0}
    rolled_back = Ledger(rundir.ledger).roll_back(meta["version"])
    if found or rolled_back:
        log.info("continuing %s from version %d; %d later steps repeat", rundir.path, meta["version"], rolled_back)
    incarnation = rundir.next_incarnation()
    with Tracker(recipe, rundir, incarnation=incarnation) as tracker:
        placement = Placement(recipe)
        await placement.ready()
        cast = await start_cast(recipe, placement, meta["version"])
        try:
            if found:
                await cast.learner.load(str(found[0]))
            journal = await _run(recipe, rundir, tracker, cast, meta, incarnation)
        finally:
            await cast.close()
        return Finished(
            rundir=rundir, best=journal.best, evaluations=journal.evaluations, version=cast.learner.version,
            mlflow_run_id=tracker.run_id, seconds=time.monotonic() - began,
        )


async def _run(
    recipe: Recipe, rundir: RunDir, tracker: Tracker, cast: Cast, meta: Mapping[str, Any], incarnation: int
) -> RunJournal:
    steps, version = recipe.run.steps, int(meta["version"])
    progress = Progress(first=version, steps=steps, primary=recipe.evaluation.primary)
    pins = Pins(rundir.path / "exports")
    pins.forget_after(version)
    hands = Hands(save=cast.learner.save, export=cast.learner.export, gauges=cast.gauges, show=progress.show)
    journal = RunJournal(
        recipe, rundir, tracker, pins, hands, position=int(meta["position"]), incarnation=incarnation
    )
    missed = journal.recall(tracker.evaluations(up_to=version))
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, journal.stop)
    buffer = Buffer(
        batch=recipe.loop.batch_prompts, staleness=recipe.loop.staleness,
        wanted=(steps - version) * recipe.loop.batch_prompts, discard_budget=recipe.loop.discard_budget,
    )
    actors = Actors(generator=cast.generator, scorers=cast.scorers, learner=cast.learner, evaluator=cast.evaluator)
    try:
        await run(
            actors, cast.prompts.start_at(journal.position), buffer, journal, start=await cast.learner.stored(),
            steps=steps, unfinished=[weights_from_directory(pins.path(v), v) for v in missed if v != version],
        )
    finally:
        progress.close()
    return journal
