"""The composition root: from a recipe to running actors, a finished run and what it leaves behind."""

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.engine import EngineStats
from actors.evaluator import EvaluatorActor
from actors.weight_sync import weights_from_directory
from cluster.cast import CLOSE_S, STARTUP_S, Cast, start_cast
from cluster.group import EvaluatorGroup, call
from cluster.nodes import watch_nodes
from cluster.placement import Placement, all_ready
from cluster.progress import Progress
from cluster.report.refresh import Refresher, write_report
from cluster.report.text import head
from configs.errors import UserError
from configs.schema import Recipe
from trainers import checkpoint
from trainers.batch import informative
from trainers.buffer import Buffer
from trainers.figure import curves
from trainers.final import Reserve, reserve, settle
from trainers.journal import Hands, RunJournal
from trainers.ledger import Ledger
from trainers.online import Actors, run
from trainers.overlap import check_overlap
from trainers.pins import Pins
from trainers.records import read_evaluations
from trainers.rundir import RunDir
from trainers.spool import read_metrics
from trainers.tracking import Tracker
from trainers.types import Evaluation, InfraError, Prompt
from trainers.watcher import UNJUDGED, Watcher

log = logging.getLogger("headroom")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a run leaves behind."""

    rundir: RunDir
    best: tuple[int, Path] | None  # version that is best by the primary evaluation, and its HF model
    evaluations: Mapping[int, Mapping[str, float]]  # version -> task/metric -> mean
    version: int
    figure: Path
    answers: tuple[str, ...]  # of the instrument, a line each; none without evaluations
    mlflow_run_id: str | None
    seconds: float
    engines: Mapping[str, EngineStats]  # by generator; counted in this incarnation


def train(recipe: Recipe, resume: str | None = None) -> Finished:
    """Run `recipe`, or continue it if its run directory (or `resume`) holds a checkpoint.

    Raises UserError for what the user can mend, InfraError when the machines failed.
    """
    if resume is not None:  # everything that goes by the run's directory goes by this one
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": resume})})
    rundir = RunDir(Path(recipe.run.dir.format(name=recipe.run.name))).create()
    with rundir.lock():
        rundir.adopt_config(recipe.model_dump(mode="json"))
        connect(recipe)
        try:
            return run_until_signal(_train(recipe, rundir))
        finally:
            ray.shutdown()


def connect(recipe: Recipe) -> None:
    """Start a private Ray on this machine, or join the one at ray.address.

    Raises UserError if none is there, InfraError if this machine is too slow to start one.
    """
    variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    local = recipe.ray.address == "local"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # actors share cores here: threads that spin would take them
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets the driver starve the engines on a small machine
    try:
        ray.init(
            address=recipe.ray.address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": variables},
            **({"num_cpus": os.cpu_count(), "include_dashboard": False} if local else {}),
        )
    except ConnectionError as error:
        raise UserError(f"ray.address: no Ray answers at {recipe.ray.address}; start one or use local") from error
    except Exception as error:  # Ray has no kind of its own for this one
        if "timed out during startup" not in str(error):
            raise
        raise InfraError("Ray's processes were not up after 30 s; is the machine busy with something else?") from error


def run_until_signal(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` in a loop of its own and return what it does. SIGTERM and Ctrl-C end it at once until it listens.

    Raises KeyboardInterrupt then, or SystemExit with code 143; of an exception group its first cause.
    """

    def end(number: int, _: object) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return asyncio.run(main)
    except BaseExceptionGroup as group:
        raise first_cause(group) from group
    except asyncio.CancelledError:  # by the second Ctrl-C of `listen`
        raise KeyboardInterrupt from None
    except (KeyboardInterrupt, SystemExit) as error:
        asked = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "SIGTERM"
        log.info("ended by %s; the same command starts again", asked)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        nodes = placement.nodes() if recipe.tracking.system_metrics else []
        watching = asyncio.create_task(watch_nodes(nodes, tracker))
        try:
            cast = await start_cast(recipe, placement, meta["version"])
            try:
                if found:
                    await cast.learner.load(str(found[0]))
                journal = await _run(recipe, rundir, tracker, cast, meta, incarnation)
                engines = await cast.engine_stats()
            finally:
                await cast.close()
        finally:
            watching.cancel()  # before the tracker closes
        figure = draw(recipe, rundir, journal.best)
        tracker.log_figure(figure)
        answers = tell(recipe, rundir, tracker) if journal.best else ()
        tracker.finish("KILLED" if journal.stopping() else "FINISHED")
        return Finished(
            figure=figure,
            answers=answers,
            rundir=rundir,
            best=journal.best,
            evaluations=journal.evaluations,
            version=cast.learner.version,
            mlflow_run_id=tracker.run_id,
            seconds=time.monotonic() - began,
            engines=engines,
        )


async def _run(
    recipe: Recipe, rundir: RunDir, tracker: Tracker, cast: Cast, meta: Mapping[str, Any], incarnation: int
) -> RunJournal:
    steps, version = recipe.run.steps, int(meta["version"])
    progress = Progress(first=version, steps=steps, primary=recipe.evaluation.primary)
    pins = Pins(rundir.path / "exports")
    pins.forget_after(version)
    refresher = Refresher(rundir.path, recipe.alarm, tracker.log_report)
    hands = Hands(
        save=cast.learner.save,
        export=cast.learner.export,
        gauges=cast.gauges,
        show=progress.show,
        judge=Watcher(rundir.path, recipe.alarm).look,
        raise_kl=cast.learner.raise_kl,
        refresh=refresher.refresh,
    )
    aside = await asyncio.to_thread(reserve, recipe)
    journal = RunJournal(
        recipe,
        rundir,
        tracker,
        pins,
        hands,
        shortlisting=aside is not None,
        version=version,
        position=int(meta["position"]),
        incarnation=incarnation,
    )
    await asyncio.to_thread(note_data, recipe, rundir, tracker, cast)
    missed = journal.recall(tracker.evaluations(up_to=version))
    if version >= steps:
        log.info("version %d is there already and run.steps is %d: raise it to train on", version, steps)
    listen(journal)
    actors = Actors(generator=cast.generator, scorers=cast.scorers, learner=cast.learner, evaluator=cast.evaluator)
    try:
        await run(
            actors,
            cast.prompts.start_at(journal.position),
            buffer_of(recipe, steps - version),
            journal,
            start=await cast.learner.stored(),
            steps=steps,
            unfinished=[weights_from_directory(pins.path(v), v) for v in missed if v != version],
            keep=informative if recipe.algorithm.informative_groups else lambda _: True,
        )
        if aside is not None:
            await settle_best(recipe, rundir, tracker, cast, pins, journal, aside)
    finally:
        progress.close()
        await refresher.close()
    if journal.stopping():
        log.info("asked to end: saved at version %d of %d; the same command continues", cast.learner.version, steps)
    return journal


def buffer_of(recipe: Recipe, steps: int) -> Buffer:
    """Return an empty buffer for the steps that are left."""
    return Buffer(
        batch=recipe.loop.batch_prompts,
        staleness=recipe.loop.staleness,
        wanted=steps * recipe.loop.batch_prompts,
        discard_budget=recipe.loop.discard_budget,
        refill_budget=recipe.algorithm.refill_budget,
    )


async def settle_best(
    recipe: Recipe, rundir: RunDir, tracker: Tracker, cast: Cast, pins: Pins, journal: RunJournal, aside: Reserve
) -> None:
    """Evaluate the likely best versions again and keep the best of them; left to the resume if asked to end."""

    async def evaluate(version: int, prompts: Sequence[Prompt]) -> Evaluation:
        weights = await asyncio.to_thread(weights_from_directory, pins.path(version), version)
        return await cast.evaluator.evaluate_on(weights, aside.task.name, prompts)

    settling = asyncio.ensure_future(settle(rundir, aside, recipe.evaluation.primary or "", pins.versions(), evaluate))
    asked = asyncio.ensure_future(journal.asked())
    try:
        await asyncio.wait((settling, asked), return_when=asyncio.FIRST_COMPLETED)
        if not settling.done() or (found := settling.result()) is None:
            return
    finally:
        settling.cancel()
        asked.cancel()
    journal.settle(found.version)
    tracker.log_final(found.folder)
    tracker.log_tags(found.tags)


def listen(journal: RunJournal) -> None:
    """End in order on SIGTERM or Ctrl-C, and at once on a second Ctrl-C."""
    loop, running = asyncio.get_running_loop(), asyncio.current_task()
    assert running is not None

    def interrupt() -> None:
        if journal.stopping():
            running.cancel()
        else:
            log.info("ending after the current step; Ctrl-C again ends at once")
            journal.stop()

    loop.add_signal_handler(signal.SIGTERM, journal.stop)
    loop.add_signal_handler(signal.SIGINT, interrupt)


def note_data(recipe: Recipe, rundir: RunDir, tracker: Tracker, cast: Cast) -> None:
    """Log the prompts, and what evaluations share with them; refuse to continue a run on other ones."""
    digest = cast.prompts.rows_hash
    rundir.adopt_datasets({"prompts": digest})
    tracker.log_dataset(
        "prompts",
        digest=digest,
        source=recipe.data.path,
        context="training",
        prompts=len(cast.prompts),
        too_long=cast.prompts.too_long,
    )
    overlap = check_overlap(recipe.evaluation.tasks, cast.prompts.texts())
    tracker.log_tags({f"overlap.{task}": f"{found.share:.4f}" for task, found in overlap.items()})


def draw(recipe: Recipe, rundir: RunDir, best: tuple[int, Path] | None) -> Path:
    """Draw reward, primary evaluation and KL by policy version; bands are one standard error where one is known."""
    metrics = read_metrics(rundir.metrics)
    errors = dict(metrics.get("reward/mean_se", []))
    reward = [(version, mean, errors.get(version, math.nan)) for version, mean in metrics.get("reward/mean", [])]
    task, _, metric = (recipe.evaluation.primary or "").partition("/")
    primary = [
        (version, float(scores.mean()), float(scores.std(ddof=1) / len(scores) ** 0.5))
        for version, results in sorted(read_evaluations(rundir.evaluations).items())
        for scores in (result.scores[metric] for result in results if result.task == task)
    ]
    evaluations = {recipe.evaluation.primary: primary} if recipe.evaluation.primary and primary else {}
    path = rundir.path / "curves.png"
    return curves(path, reward, evaluations, metrics.get("kl/reference", []), best[0] if best else None)


def tell(recipe: Recipe, rundir: RunDir, tracker: Tracker) -> tuple[str, ...]:
    """Write the run's report, keep it in MLflow, and return what to know first. What can't be judged ends nothing."""
    try:
        view, path = write_report(rundir.path, recipe.alarm)
    except UNJUDGED as error:
        log.warning("no report: %s", error)
        return ()
    tracker.log_report(path)
    return (*head(view), "", f"report           {path}")


def evaluate(recipe: Recipe, directory: str | None = None) -> Sequence[Evaluation]:
    """Run every evaluation task on one model in HF format (default: model.path), and log it as a run of its own."""
    path = f"{recipe.run.dir.format(name=recipe.run.name)}-eval-{time.strftime('%Y%m%d-%H%M%S')}"
    rundir = RunDir(Path(path)).create()
    connect(recipe)
    try:
        with Tracker(recipe, rundir, incarnation=0) as tracker:
            results = run_until_signal(_evaluate(recipe, Path(directory or recipe.model.path), path))
            tracker.log_evaluations(results)
            return results
    finally:
        ray.shutdown()


async def _evaluate(recipe: Recipe, model: Path, run_name: str) -> Sequence[Evaluation]:
    resources = recipe.evaluation.resources
    actor = (
        ray.remote(EvaluatorActor).options(num_cpus=resources.cpus, num_gpus=resources.gpus).remote(recipe, run_name)
    )
    group = EvaluatorGroup(actor, steps=0, every=recipe.evaluation.every, deadline_s=recipe.evaluation.deadline_s)
    await all_ready({"evaluator-0": actor.start.remote()}, STARTUP_S)
    try:
        return await group.evaluate(weights_from_directory(model, 0))
    finally:  # what `evaluate` raised says more than an engine that cannot be closed
        await asyncio.gather(call(actor.close.remote(), "closing the evaluator", CLOSE_S), return_exceptions=True)
