"""The report of a run in training: written beside it, not too often, and whatever goes wrong with it ends nothing."""

import asyncio
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.report.refresh import Refresher
from configs.schema import AlarmConfig
from tests.journals import evaluate, journal_of, step

WAIT_S = 120


async def train(where: Path, versions: range, uri: str) -> None:
    journal = journal_of(where, version=versions[0] - 1, uri=uri)
    for version in versions:
        await step(journal, version)
        await evaluate(journal, version, float(version), prompts=20)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "cluster.report.refresh" in p.cmdline()]


async def wait_until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.slow
def test_it_is_written_anew_but_not_too_often_and_the_loop_goes_on(tmp_path: Path) -> None:
    uri, where, kept, longest = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run", [], [0.0]

    async def tick() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            longest[0], last = max(longest[0], time.monotonic() - last), time.monotonic()

    async def main() -> None:
        await train(where, range(1, 4), uri)
        refresher = Refresher(where, AlarmConfig(report_every_s=3600), kept.append)
        ticking = asyncio.create_task(tick())
        began = time.monotonic()
        refresher.refresh()
        refresher.refresh()
        await wait_until(children)
        [child] = children()
        await wait_until(lambda: child.nice() == 19)
        await wait_until(lambda: kept)
        ticking.cancel()
        took = time.monotonic() - began
        assert longest[0] < took / 3, "the loop stood still while the report was drawn"
        refresher.refresh()
        assert not children(), "an hour has not passed"
        await refresher.close()
        first = kept[0].read_text(encoding="utf-8")
        assert kept == [where / "report" / "report.html"] and "1 to 3" in first
        await train(where, range(4, 6), uri)
        again = Refresher(where, AlarmConfig(report_every_s=0), kept.append)
        again.refresh()
        await wait_until(lambda: len(kept) == 2)
        assert "1 to 5" in kept[1].read_text(encoding="utf-8")
        again.refresh()
        await wait_until(children)
        await again.close()
        assert not children() and len(kept) == 2, "who closes writes the last one"

    asyncio.run(main())


def test_what_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        refresher = Refresher(tmp_path / "nowhere", AlarmConfig(report_every_s=0), lambda path: None)
        for _ in range(2):
            refresher.refresh()
            assert refresher._building is not None
            await refresher._building

    asyncio.run(main())
    told = [line for line in caplog.messages if line.startswith("no report: ")]
    assert len(told) == 1 and "nowhere: no such file or run directory" in told[0]
