"""What the journal saves and keeps, on disk and without actors."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.report.build import build
from cluster.report.figures import pictures
from cluster.report.page import page
from configs.schema import KL
from tests.journals import evaluate, journal_of, judged, step, trained, weights
from trainers.checkpoint import find_latest
from trainers.pins import Pins
from trainers.rundir import RunDir
from trainers.sources import read
from trainers.spool import read as read_spool
from trainers.spool import read_metrics
from trainers.targets import KLCoefficient


def test_suspend_saves_the_last_step_once(tmp_path: Path) -> None:
    async def main() -> None:
        journal = journal_of(tmp_path)
        await journal.suspend()
        assert find_latest(tmp_path / "checkpoints") is None, "version 0 is the start model"
        for version in range(1, 6):
            await step(journal, version)
        assert saved(tmp_path) == (4, 4)
        await journal.suspend()
        assert saved(tmp_path) == (5, 5)
        written = (tmp_path / "checkpoints" / "step-000005").stat().st_mtime_ns
        await journal.suspend()
        assert (tmp_path / "checkpoints" / "step-000005").stat().st_mtime_ns == written

    asyncio.run(main())


def saved(where: Path) -> tuple[int, int]:
    found = find_latest(where / "checkpoints")
    assert found is not None
    return found[1]["version"], found[1]["position"]


def test_a_kill_cannot_take_the_best_model_away(tmp_path: Path) -> None:
    async def main() -> None:
        journal = journal_of(tmp_path)
        for version, score in enumerate((0.1, 0.3, 0.2, 0.1, 0.2, 0.9)):
            if version:
                await step(journal, version)
            await evaluate(journal, version, score)
        pins = Pins(tmp_path / "exports")
        assert pins.versions() == [1, 5], "5 is the best, 1 would be if a resume went back to the checkpoint at 4"
        for version in (6, 7, 8):
            await step(journal, version)
        await evaluate(journal, 8, 0.4)
        assert pins.versions() == [5], "the checkpoint at 8 knows of 5"
        assert journal.best == (5, pins.path(5))

    asyncio.run(main())


def test_what_is_queued_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        journal = journal_of(tmp_path)
        for version in (0, 1, 2):
            assert await journal.pin(weights(version))
        await evaluate(journal, 0, 1.0)
        assert Pins(tmp_path / "exports").versions() == [0, 1, 2]
        assert journal_of(tmp_path).recall({}) == [0, 1, 2], "a resume evaluates what was not"

    asyncio.run(main())


def test_only_versions_with_a_task_are_pinned(tmp_path: Path) -> None:
    async def pinned(at: str) -> list[int]:
        journal = journal_of(tmp_path / at, steps=9, every=2, at=at)
        return [version for version in range(10) if await journal.pin(weights(version))]

    assert asyncio.run(pinned("every")) == [0, 2, 4, 6, 8, 9]
    assert asyncio.run(pinned("first_middle_last")) == [0, 4, 9]


@pytest.mark.parametrize("action", ["report", "stop"])
def test_a_fallen_evaluation_is_told_and_ends_the_run_where_the_recipe_says_so(tmp_path: Path, action: str) -> None:
    """The reward rises to the end, gold to version 5: each judged from what the journal itself has written."""

    async def main() -> list[str | None]:
        journal = journal_of(tmp_path / "run", steps=12, action=action, uri=f"sqlite:///{tmp_path}/mlflow.db")
        states: list[str | None] = []
        await evaluate(journal, 0, 0.0, prompts=50)
        for version in range(1, 13):
            await step(journal, version)
            await evaluate(journal, version, float(min(version, 10 - version)), prompts=50)
            states.append(journal.state)
            if journal.stopping():
                break
        return states

    states = asyncio.run(main())
    assert states[4] == "aligned" and states[-1] == "parted"
    assert len(states) == (12 if action == "report" else states.index("parted") + 1)


def test_each_fall_raises_the_kl_coefficient_once_whatever_is_resumed(tmp_path: Path) -> None:
    """Gold falls at 4 and 12, seen a point later, and is back at 8; the run is resumed while the first fall stands."""
    where, kl = tmp_path / "run", KLCoefficient(config=KL(), value=0.05)
    levels = [0, 1, 2, 3, 0, 0, 0, 3, 4, 5, 6, 7, 1, 1, 1]
    values = []

    async def play(first: int, last: int) -> None:
        journal = journal_of(where, version=first - 1, steps=20, action="raise_kl", uri=uri, kl=kl)
        for version in range(first, last):
            await step(journal, version)
            await evaluate(journal, version, float(levels[version]), prompts=50)
            values.append(round(kl.value, 9))
            assert not journal.stopping()

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    asyncio.run(play(1, 6))
    asyncio.run(play(6, 15))
    assert values == [0.05] * 4 + [0.2] * 8 + [0.8] * 2
    taken = [r["value"] for r in read_spool(where / "metrics.jsonl") if r.get("key") == "alarm.action_taken"]
    assert taken == ["raise_kl on the evaluation of version 5", "raise_kl on the evaluation of version 13"]


def test_after_the_last_step_nothing_is_raised(tmp_path: Path) -> None:
    async def main() -> float:
        kl = KLCoefficient(config=KL(), value=0.05)
        journal = journal_of(tmp_path / "run", steps=8, action="raise_kl", uri=f"sqlite:///{tmp_path}/mlflow.db", kl=kl)
        for version in range(1, 9):
            await step(journal, version)
            if version < 8:
                await evaluate(journal, version, float(version < 7), prompts=50)
        assert journal.state == "aligned"  # one low point is no fall
        await evaluate(journal, 8, 0.0, prompts=50)
        assert journal.state is not None and journal.state != "aligned"
        return kl.value

    assert asyncio.run(main()) == 0.05


def test_what_cannot_be_judged_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        journal = journal_of(tmp_path)  # its tracker writes nothing
        await step(journal, 1)
        await evaluate(journal, 1, 0.0)
        await step(journal, 2)
        await evaluate(journal, 2, 0.0)
        assert journal.state is None and not journal.stopping()

    asyncio.run(main())
    assert sum("alarm: nothing is said" in line for line in caplog.messages) == 1, "once is enough"


def test_two_planned_evaluations_are_too_few_and_no_mistake(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        journal = journal_of(tmp_path / "run", steps=2, every=2, uri=f"sqlite:///{tmp_path}/mlflow.db")
        await evaluate(journal, 0, 0.0, prompts=50)
        for version in (1, 2):
            await step(journal, version)
        await evaluate(journal, 2, 1.0, prompts=50)
        assert journal.state is None

    asyncio.run(main())
    assert not any("nothing is said" in line for line in caplog.messages)
    view = build(read(str(tmp_path / "run")))
    assert "not enough" in page(view, pictures(view)).lower() and view.chosen.version is None


MODELS = ({"name": "a", "model": "some/model"}, {"name": "b", "model": "another/model"})
ENSEMBLES: Mapping[str, tuple[Sequence[Mapping[str, Any]], bool]] = {
    "two models": (MODELS, True),
    "one model": (MODELS[:1], False),
    "a model and a function": ((MODELS[0], {"name": "b", "function": "a:b"}), False),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_s_disagreement_is_measured_from_the_first_batch_also_after_a_resume(
    tmp_path: Path, name: str
) -> None:
    """In the first batch model a has mean 2 and spread 1, model b mean 20 and spread 10; later a has risen alone."""
    components, ensemble = ENSEMBLES[name]
    where, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"

    async def play(version: int, a: Sequence[float], b: Sequence[float]) -> None:
        journal = journal_of(where, version=version - 1, uri=uri, components=components)
        await trained(journal, judged(version, a, b), version)

    asyncio.run(play(1, [1, 3], [10, 30]))
    asyncio.run(play(2, [5, 7], [10, 30]))
    metrics = read_metrics(RunDir(where).metrics)
    found = metrics.get("reward/disagreement", [])
    assert found == ([(1, pytest.approx(0, abs=1e-12)), (2, pytest.approx(4 / 2**0.5))] if ensemble else [])
    assert metrics["reward/mean_se"] == [(1, pytest.approx(11.0)), (2, pytest.approx(11.0))]


def test_numerics_that_fail_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def singular(*_: Any) -> None:
        raise np.linalg.LinAlgError("Singular matrix")

    async def main() -> None:
        journal = journal_of(tmp_path / "run", uri=f"sqlite:///{tmp_path}/mlflow.db")
        await step(journal, 1)
        await evaluate(journal, 1, 0.0, prompts=50)
        assert journal.state is None and not journal.stopping()

    monkeypatch.setattr("trainers.watcher.judge_run", singular)
    asyncio.run(main())
    assert any("nothing is said: Singular matrix" in line for line in caplog.messages)
