"""The composition root: from a recipe to running actors, a finished run and what it leaves behind."""

import asyncio
import importlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.evaluator import EvaluatorActor
from actors.generator import GeneratorActor
from actors.learner import CriticRank, LearnerRank
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from actors.weight_sync import WeightSender, weights_from_directory
from cluster.group import Busy, EvaluatorGroup, GeneratorGroup, LearnerGroup, ScorerGroup
from cluster.placement import Placement, all_ready
from cluster.progress import Progress
from configs.schema import Recipe
from trainers import checkpoint
from trainers.algorithms import ALGORITHMS
from trainers.buffer import Buffer
from trainers.data import PromptStream, load_rows, load_tokenizer
from trainers.journal import Hands, RunJournal
from trainers.ledger import Ledger
from trainers.online import Actors, run
from trainers.rundir import RunDir
from trainers.tracking import Tracker
from trainers.types import Sampling, Weights

log = logging.getLogger("headroom")
STARTUP_S = 600.0
STEP_S = 3600.0
PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a run leaves behind."""

    rundir: RunDir
    best: tuple[int, Path] | None  # version that is best by the primary evaluation, and its HF model
    version: int
    mlflow_run_id: str | None
    seconds: float


def train(recipe: Recipe, resume: str | None = None) -> Finished:
    """Run `recipe`, or continue it if its run directory (or `resume`) holds a checkpoint.

    Raises UserError for what the user can mend, InfraError when the machines failed.
    """
    rundir = RunDir(Path(resume) if resume else Path(recipe.run.dir.format(name=recipe.run.name)))
    with rundir.lock():
        rundir.claim(recipe)
        connect(recipe)
        try:
            return asyncio.run(_train(recipe, rundir))
        except ExceptionGroup as group:
            raise first_cause(group) from group
        finally:
            ray.shutdown()


def connect(recipe: Recipe) -> None:
    """Start a private Ray on this machine, or join the one at ray.address."""
    variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if recipe.ray.address == "local":
        cpus = max(os.cpu_count() or 1, 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                 runtime_env={"env_vars": variables})
    else:
        ray.init(address=recipe.ray.address, log_to_driver=False, logging_level="ERROR",
                 runtime_env={"env_vars": variables})


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first single exception inside nested groups."""
    cause = group.exceptions[0]
    return first_cause(cause) if isinstance(cause, BaseExceptionGroup) else cause


async def _train(recipe: Recipe, rundir: RunDir) -> Finished:
    began = time.monotonic()
    found = checkpoint.find_latest(rundir.checkpoints)
    meta: Mapping[str, Any] = found[1] if found else {"version": 0, "position": 0, "incarnation": -1}
    Ledger(rundir.ledger).roll_back(meta["version"])
    incarnation = rundir.next_incarnation()
    tracker = Tracker.open(recipe, rundir, incarnation=incarnation)
    status = "FAILED"
    try:
        placement = Placement(recipe)
        await placement.ready()
        cast = await Cast.start(recipe, placement)
        if found:
            await cast.learner.load(str(found[0]))
            log.info("resuming %s at version %d", rundir.path, meta["version"])
        journal = await _run(recipe, rundir, tracker, cast, meta, incarnation)
        status = "KILLED" if journal.stopping() else "FINISHED"
        return Finished(
            rundir=rundir, best=journal.best, version=cast.learner.version, mlflow_run_id=tracker.run_id,
            seconds=time.monotonic() - began,
        )
    finally:
        tracker.finish(status)


async def _run(
    recipe: Recipe, rundir: RunDir, tracker: Tracker, cast: "Cast", meta: Mapping[str, Any], incarnation: int
) -> RunJournal:
    steps, version = recipe.run.steps, int(meta["version"])
    progress = Progress(first=version, steps=steps, primary=recipe.evaluation.primary)
    hands = Hands(save=cast.learner.save, export=cast.learner.export, gauges=cast.gauges, show=progress.show)
    journal = RunJournal(recipe, rundir, tracker, hands, position=int(meta["position"]), incarnation=incarnation)
    rundir.forget_after(version)
    journal.recall(rundir.read_evaluations())
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, journal.stop)
    buffer = Buffer(
        batch=recipe.loop.batch_prompts, staleness=recipe.loop.staleness,
        wanted=(steps - version) * recipe.loop.batch_prompts, discard_budget=recipe.loop.discard_budget,
    )
    start = await cast.publish_start(version)
    unfinished = [weights_from_directory(path, v) for v, path in rundir.unfinished_exports() if v != version]
    actors = Actors(generator=cast.generator, scorers=cast.scorers, learner=cast.learner, evaluator=cast.evaluator)
    prompts = cast.prompts.start_at(journal.position)
    tracker.log_inputs(cast.prompts)
    try:
        await run(actors, prompts, buffer, journal, start=start, steps=steps, unfinished=unfinished)
    finally:
        progress.close()
    if journal.stopping() and journal.last_saved != cast.learner.version:
        await journal.save(Weights(version=cast.learner.version, hash="", handle=None))
    return journal
