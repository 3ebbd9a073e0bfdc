"""The end of a run: what is evaluated again, on which prompts, what is said then, and whose weights are kept."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.report.build import build
from cluster.report.text import text
from cluster.watch import page
from configs.schema import Data, EvalScorer, EvalTask, Recipe
from tests.journals import evaluate, journal_of, step
from tests.tiny import tokenizer
from trainers.final import Reserve, Settled, reserve, settle
from trainers.journal import SPARE
from trainers.mismatch import to_json
from trainers.pins import Pins
from trainers.records import write_evaluations
from trainers.rundir import RunDir
from trainers.sources import read
from trainers.spool import read_metrics
from trainers.types import Evaluation, InfraError, Prompt
from trainers.watcher import judge_run

STEPS, PEAK, GAIN = 12, 6, 0.1
PRIMARY = "held/gold"


def truth(version: int) -> float:
    """Rise by GAIN a version up to the peak, then fall as fast."""
    return GAIN * float(min(version, 2 * PEAK - version))


def prompts(first: int, count: int) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(uid=f"e0-p{place}", position=place, messages=(), token_ids=np.zeros(1, np.int32))
        for place in range(first, first + count)
    )


ASIDE = Reserve(
    task=EvalTask(name="held", data=Data(path="x.jsonl"), scorers=[EvalScorer(name="gold", function="a:b")]),
    again=prompts(100, 30),
    untouched=prompts(200, 40),
)


class Evaluator:
    """Stands where the actor does; dies at the call `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []  # version, number of prompts
        self._dies_at = dies_at

    async def __call__(self, version: int, asked: Sequence[Prompt]) -> Evaluation:
        if len(self.calls) == self._dies_at:
            raise InfraError("the evaluator died")
        self.calls.append((version, len(asked)))
        noise = np.random.default_rng([version, len(asked)]).normal(0, 0.3, len(asked))
        uids = tuple(prompt.uid for prompt in asked)
        scores = {"gold": (truth(version) + noise).astype(np.float32)}
        return Evaluation(version=version, task="held", prompt_uids=uids, scores=scores, samples=())


def trained(where: Path, steps: int = STEPS) -> RunDir:
    """Write what a run leaves that was evaluated at each of its versions so far."""
    rundir = RunDir(where / "run").create()
    params = {"evaluation.primary": PRIMARY, "run.steps": str(STEPS), "evaluation.every": "1"}
    records: list[dict[str, Any]] = [{"kind": "param", "key": key, "value": value} for key, value in params.items()]
    for version in range(steps + 1):
        point = {"kind": "metric", "key": "reward/mean", "value": version / 10, "step": version, "timestamp": version}
        records.append(point)
        write_evaluations(rundir.evaluations, [asyncio.run(Evaluator()(version, prompts(0, 50)))])
    rundir.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return rundir


def settled(rundir: RunDir, evaluator: Evaluator, kept: Sequence[int] = range(STEPS + 1)) -> Settled | None:
    return asyncio.run(settle(rundir, ASIDE, PRIMARY, kept, evaluator))


def findings(rundir: RunDir) -> Any:
    return to_json(judge_run(read(str(rundir.path))))


def test_the_best_version_is_valued_on_prompts_that_nothing_was_chosen_on(tmp_path: Path) -> None:
    rundir = trained(tmp_path)
    before, metrics = findings(rundir), read_metrics(rundir.metrics)
    evaluator = Evaluator()
    found = settled(rundir, evaluator)
    assert found is not None and abs(found.version - PEAK) <= 1
    again, untouched = ([v for v, size in evaluator.calls if size == len(of)] for of in (ASIDE.again, ASIDE.untouched))
    assert again[0] == 0 and len(again) == 4 and untouched == [0, found.version]

    after = findings(rundir)
    scores = asyncio.run(Evaluator()(found.version, ASIDE.untouched)).scores["gold"]
    assert after["chosen_version"] == found.version and after["chosen_value"]["sample"] == "untouched"
    assert after["chosen_value"]["value"] == pytest.approx(float(np.mean(scores, dtype=np.float64)))
    assert found.tags["chosen.version"] == str(found.version)
    assert float(found.tags["chosen.value"]) == pytest.approx(after["chosen_value"]["value"], rel=1e-5)
    assert before["chosen_value"]["sample"] == "curve"
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"chosen_version", "chosen_value", "chosen_gain", "reasons"}, "no alarm, curve or correlation"
    assert read_metrics(rundir.metrics) == metrics

    run = read(str(rundir.path))
    assert "on prompts that nothing was chosen on" in page(run, judge_run(run))
    assert "Measured on prompts that nothing was chosen on" in text(build(run))


@pytest.mark.parametrize("dies_at", [0, 2, 5])
def test_what_was_interrupted_goes_on_and_what_is_done_is_not_done_again(tmp_path: Path, dies_at: int) -> None:
    rundir = trained(tmp_path)
    first, second, third, whole = Evaluator(dies_at), Evaluator(), Evaluator(), Evaluator()
    with pytest.raises(InfraError):
        settled(rundir, first)
    assert findings(rundir)["chosen_value"]["sample"] == "curve", "a part of a shortlist is nothing to choose from"
    found = settled(rundir, second)
    assert settled(rundir, third) == found is not None and third.calls == []
    other = settled(trained(tmp_path / "other"), whole)
    assert other is not None and (other.version, other.selected) == (found.version, found.selected)
    assert first.calls + second.calls == whole.calls


def test_a_run_that_goes_on_is_chosen_for_anew(tmp_path: Path) -> None:
    rundir = trained(tmp_path, steps=8)
    assert settled(rundir, Evaluator()) is not None
    assert findings(rundir)["chosen_value"]["sample"] == "untouched"
    rundir = trained(tmp_path, steps=10)
    assert findings(rundir)["chosen_value"]["sample"] == "curve"
    rundir.forget_after(7)
    assert not list(rundir.final.iterdir()), "what belongs to a later version is rolled back with it"


def test_only_versions_whose_weights_are_there_are_evaluated_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rundir = trained(tmp_path)
    evaluator = Evaluator()
    found = settled(rundir, evaluator, kept=[0, 2, 3])
    assert found is not None and found.version == 3
    assert [version for version, size in evaluator.calls if size == len(ASIDE.again)] == [0, 2, 3]
    assert settled(trained(tmp_path / "other"), evaluator, kept=[2, 3]) is None
    assert "not evaluated again: the weights of version 0 are gone" in caplog.text


def test_weights_of_what_may_be_best_are_kept_and_no_more(tmp_path: Path) -> None:
    pins = Pins(tmp_path / "run" / "exports")

    async def main() -> None:
        journal = journal_of(tmp_path / "run", steps=30, shortlisting=True)  # nothing is judged: by the measured means
        await evaluate(journal, 0, 0.0)
        for version in range(1, 31):
            await step(journal, version)
            await evaluate(journal, version, float(min(version, 30 - version)))
            assert len(pins.versions()) <= SPARE + 4 and 0 in pins.versions()
        assert {14, 15, 16, 30} <= set(pins.versions())
        journal.settle(15)
        assert pins.versions() == [0, 15, 30] and journal.best == (15, pins.path(15))

    asyncio.run(main())


def test_the_alarm_ends_a_run_but_not_what_comes_after_it(tmp_path: Path) -> None:
    async def main() -> None:
        journal = journal_of(
            tmp_path / "run", steps=12, action="stop", uri=f"sqlite:///{tmp_path}/mlflow.db", shortlisting=True
        )
        asked = asyncio.ensure_future(journal.asked())
        await evaluate(journal, 0, 0.0, prompts=50)
        for version in range(1, 13):
            await step(journal, version)
            await evaluate(journal, version, float(min(version, 10 - version)), prompts=50)
            if journal.stopping():
                break
        assert journal.stopping() and version < 12 and not asked.done()
        pins = Pins(tmp_path / "run" / "exports")
        kept = pins.versions()
        journal.settle(5)
        assert {0, 4, 5, 6} <= set(kept) == set(Pins(tmp_path / "run" / "exports").versions()), (
            "the same command goes on"
        )
        journal.stop()
        await asyncio.wait_for(asked, 5)

    asyncio.run(main())


def recipe(where: Path, rows: int, **final: int) -> Recipe:
    tokenizer().save_pretrained(where / "model")
    lines = [json.dumps({"prompt": f"question {place}"}) for place in range(rows)]
    (where / "rows.jsonl").write_text("\n".join(lines + lines[:3]) + "\n")
    data = {"path": str(where / "rows.jsonl"), "render": "text"}
    task = {
        "name": "held", "data": data, "prompts": 10, "sampling": {"n": 1, "max_tokens": 8},
        "scorers": [{"name": "gold", "function": "a:b"}],
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "run": {"name": "test"},
            "model": {"path": str(where / "model")},
            "data": data,
            "evaluation": {"primary": PRIMARY, "tasks": [task], "final": final},
        }
    )


def test_prompts_are_set_aside_that_no_evaluation_uses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    aside = reserve(recipe(tmp_path, rows=35, untouched=15))
    assert aside is not None and [len(aside.again), len(aside.untouched)] == [10, 15]
    texts = [prompt.messages[0]["content"] for prompt in (*aside.again, *aside.untouched)]
    assert len(set(texts)) == 25
    assert reserve(recipe(tmp_path, rows=35, prompts=0)) is None and not caplog.messages
    assert reserve(recipe(tmp_path, rows=29)) is None
    assert "evaluation.final: task held has" in caplog.text and "10 + 10 are wanted" in caplog.text
