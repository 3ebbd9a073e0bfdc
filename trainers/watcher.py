"""What the instrument says of a run: asked once, or by the run itself after each of its evaluations."""

import asyncio
import logging
import math
from dataclasses import replace
from pathlib import Path

from configs.errors import UserError
from configs.schema import AlarmConfig
from trainers.measured import MeasuredRun
from trainers.mismatch import Curve, Settings
from trainers.mismatch.alarm import FEWEST
from trainers.mismatch.findings import Findings, find
from trainers.sources import read

log = logging.getLogger("headroom")
# What judging a run may meet: a mistake in what it logged, files that can't be read or written, and numerics (numpy's
# LinAlgError is a ValueError). Training goes on without an answer, and the trouble is told.
UNJUDGED = (UserError, OSError, ValueError, ArithmeticError)


def judge_run(
    run: MeasuredRun,
    settings: Settings | None = None,
    *,
    kl_budget: float | None = None,
    version_budget: int | None = None,
) -> Findings:
    """Ask the instrument about one run, with what the run itself knows: how many evaluations it will have, and its end.

    Of no budget, the headroom is that up to the last version of the recipe, where it is known and not yet evaluated.
    Raises UserError as `find` does.
    """
    settings = settings or Settings()
    if settings.planned is None and run.planned is not None and run.planned >= FEWEST:
        settings = replace(settings, planned=run.planned)
    versions = run.series.primary.versions
    ended = run.final_version is None or (len(versions) > 0 and int(versions[-1]) >= run.final_version)
    if kl_budget is None and version_budget is None and not ended:
        version_budget = run.final_version
    early: list[tuple[str, Curve]] = [(one.kind, one.curve) for one in run.early_warnings]
    if run.series.kl is not None:
        early.append(("KL", run.series.kl))
    return find(
        run.series,
        settings,
        kl_budget=kl_budget,
        version_budget=version_budget,
        final=run.final,
        notes=run.notes,
        early=early,
        answers=run.answers,
        length=run.length,
    )


def alarm_settings(config: AlarmConfig) -> Settings:
    """Turn the recipe's section into what the alarm is asked for."""
    return Settings(alpha=config.alpha, margin=config.margin, runs=max(20_000, math.ceil(100 / config.alpha)))


class Watcher:
    """Asks the instrument about a run from the run's own directory. What it cannot read ends nothing."""

    def __init__(self, directory: Path, config: AlarmConfig) -> None:
        self._directory = directory
        self._settings = alarm_settings(config)
        self._told = ""

    async def look(self) -> Findings | None:
        """Judge what the directory holds now, in a thread; None, and a warning, if that cannot be read."""
        try:
            return await asyncio.to_thread(self._judge)
        except UNJUDGED as error:
            if str(error) != self._told:
                log.warning("alarm: nothing is said: %s", error)
            self._told = str(error)
            return None

    def _judge(self) -> Findings:
        return judge_run(read(str(self._directory)), self._settings)
