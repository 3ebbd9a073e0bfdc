"""Journals of runs without actors, on disk and with a real tracker, for the tests of what is kept and judged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import KL, Recipe
from trainers.buffer import Take
from trainers.journal import Hands, RunJournal
from trainers.pins import Pins
from trainers.rundir import RunDir
from trainers.targets import KLCoefficient
from trainers.tracking import Tracker
from trainers.types import Evaluation, Group, Prompt, Rollout, StepStats, VersionSpan, Weights
from trainers.watcher import Watcher

TRACKERS: list[Tracker] = []  # of the test that runs: conftest.py ends them


class SilentTracker:
    """Stands where MLflow's tracker does; what it keeps is not tested here."""

    run_id = None

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def journal_of(
    where: Path,
    *,
    version: int = 0,
    steps: int = 100,
    checkpoint_every: int = 4,
    every: int = 1,
    at: str = "every",
    action: str = "report",
    shortlisting: bool = False,
    uri: str | None = None,
    kl: KLCoefficient | None = None,
    components: Sequence[Mapping[str, Any]] = (),
) -> RunJournal:
    """Build the journal of a run at `version`; its tracker is real where `uri` says where to. `kl` is the learner's."""
    kl = kl or KLCoefficient(config=KL(), value=1.0)

    async def write(path: str) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "state").write_text("weights")

    async def gauges() -> Mapping[str, float]:
        return {}

    async def raise_kl(factor: float, version: int, since: int) -> bool:
        return kl.raise_by(factor, version=version, since=since)

    task = {"name": "held", "data": {"path": "x.jsonl"}, "scorers": [{"name": "gold", "function": "a:b"}], "at": at}
    recipe = Recipe.model_validate(
        {
            "run": {"name": "test", "steps": steps, "checkpoint_every": checkpoint_every},
            "model": {"path": "m"},
            "data": {"path": "x.jsonl"},
            "reward": {"components": [*components]},
            "evaluation": {"every": every, "tasks": [task], "primary": "held/gold"},
            "alarm": {"action": action},
            "tracking": {"uri": uri or "sqlite:///unused.db", "system_metrics": False},
        }
    )
    rundir = RunDir(where).create()
    hands = Hands(
        save=write,
        export=write,
        gauges=gauges,
        show=lambda *_: None,
        judge=Watcher(where, recipe.alarm).look,
        raise_kl=raise_kl,
        refresh=lambda: None,
    )
    tracker: Any = SilentTracker()
    if uri is not None:
        tracker = Tracker(recipe, rundir, incarnation=0)
        TRACKERS.append(tracker)
    pins = Pins(where / "exports")
    return RunJournal(
        recipe, rundir, tracker, pins, hands, shortlisting=shortlisting, version=version, position=0, incarnation=0
    )


def take(version: int) -> Take:
    prompt = Prompt(uid=f"e0-p{version}", position=version, messages=(), token_ids=np.zeros(1, np.int32))
    rollout = Rollout(
        uid=f"{prompt.uid}-s0",
        seed=0,
        token_ids=np.zeros(2, np.int32),
        logprobs=np.zeros(2, np.float32),
        spans=(VersionSpan(start=0, stop=2, version=version - 1),),
        finish_reason="stop",
        text="",
        reward=float(version),
    )
    return Take(groups=(Group(prompt=prompt, rollouts=(rollout,)),), discarded=())


def judged(version: int, a: Sequence[float], b: Sequence[float]) -> Take:
    """A step whose rollouts, one a prompt, were scored by two components."""
    [group] = take(version).groups
    [rollout] = group.rollouts
    scored = [
        replace(rollout, uid=f"e0-p{place}-s0", rewards={"a": x, "b": y}, reward=x + y)
        for place, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    return Take(groups=tuple(replace(group, rollouts=(one,)) for one in scored), discarded=())


def weights(version: int) -> Weights:
    return Weights(version=version, hash="", handle=None)


async def step(journal: RunJournal, version: int) -> None:
    await trained(journal, take(version), version)


async def trained(journal: RunJournal, of: Take, version: int) -> None:
    await journal.record(of, StepStats(loss=0, grad_norm=0, metrics={}, rng_hash=""), weights(version))


async def evaluate(journal: RunJournal, version: int, score: float, prompts: int = 1) -> None:
    assert await journal.pin(weights(version))
    noise = np.random.default_rng(version).normal(0, 0.1, prompts)
    scores = {"gold": (score + noise - noise.mean()).astype(np.float32)}
    uids = tuple(map(str, range(prompts)))
    await journal.evaluated([Evaluation(version=version, task="held", prompt_uids=uids, scores=scores, samples=())])
