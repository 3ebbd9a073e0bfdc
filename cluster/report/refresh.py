"""The report of a run of Headroom: written when it ends, and beside it while it trains.

python -m cluster.report.refresh RUN_DIRECTORY ALARM    # ALARM: the recipe's section as JSON; what a Refresher starts
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from cluster import report
from cluster.report.build import build
from cluster.report.figures import pictures
from cluster.report.page import page
from cluster.report.view import View
from configs.schema import AlarmConfig
from trainers.sources import read
from trainers.watcher import UNJUDGED, alarm_settings

log = logging.getLogger("headroom")
BUILD_S = 600.0


def write_report(directory: Path, config: AlarmConfig) -> tuple[View, Path]:
    """Write the report of what a run directory holds now into its folder `report`; return what it shows, and the page.

    Raises UserError if the run cannot be judged, OSError if it cannot be read or written.
    """
    view = build(read(str(directory)), alarm_settings(config))
    drawn = pictures(view)
    return view, report.write(directory / "report", page(view, drawn), drawn)


class Refresher:
    """Writes a run's report anew after evaluations, in a child process of low priority: training waits for nothing.

    A thread would not do: it holds Python's lock while it draws, and the loops stand still meanwhile.
    """

    def __init__(self, directory: Path, config: AlarmConfig, keep: Callable[[Path], None]) -> None:
        """`keep` is given the page whenever it was written anew."""
        self._directory = directory
        self._config = config
        self._keep = keep
        self._next = 0.0
        self._told = ""
        self._building: asyncio.Task[None] | None = None

    def refresh(self) -> None:
        """Begin a report, unless one is being written or was begun less than alarm.report_every_s ago."""
        now = time.monotonic()
        if now < self._next or (self._building is not None and not self._building.done()):
            return
        self._next = now + self._config.report_every_s
        self._building = asyncio.create_task(self._build())

    async def _build(self) -> None:
        """Wait for the child process; what goes wrong with it is told once and ends nothing."""
        command = (sys.executable, "-m", "cluster.report.refresh", str(self._directory), self._config.model_dump_json())
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            trouble = await finished(command, environment)
        except OSError as error:
            trouble = str(error)
        if trouble is None:
            self._keep(self._directory / "report" / "report.html")
        elif trouble != self._told:
            log.warning("no report: %s", trouble)
        self._told = trouble or ""

    async def close(self) -> None:
        """End what is being written: whoever closes writes the last report."""
        if self._building is not None:
            self._building.cancel()
            with suppress(asyncio.CancelledError):
                await self._building


async def finished(command: Sequence[str], environment: dict[str, str]) -> str | None:
    """Run a command to its end; return the last line of its errors, or None if all went well.

    It is killed when its time is up or whoever waits is cancelled. It has a process group of its own, so that Ctrl-C
    does not reach it, but no session: under the kernel's autogroups its low priority would count for nothing there.
    """
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        *command, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, process_group=0
    )
    try:
        _, said = await asyncio.wait_for(child.communicate(), BUILD_S)
    except TimeoutError:
        return f"it took longer than {BUILD_S:g} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    lines = said.decode(errors="replace").splitlines() or [f"exit code {child.returncode}"]
    return None if child.returncode == 0 else lines[-1]


def main() -> int:
    """Write one report; return 1, with a line, if that cannot be done."""
    os.nice(19)
    try:
        write_report(Path(sys.argv[1]), AlarmConfig.model_validate_json(sys.argv[2]))
    except UNJUDGED as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
