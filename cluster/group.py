"""Fan-out: several Ray actors behind the one port that the loop sees."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from actors.engine import shortened
from actors.weight_sync import Transport
from cluster.calls import call
from cluster.replicas import BACK_OFF_S, Replicas
from trainers.evaluations import milestones
from trainers.types import (
    Batch,
    Evaluation,
    Floats,
    Group,
    InfraError,
    Ints,
    Prompt,
    Rollout,
    Sampling,
    StepStats,
    Weights,
)

log = logging.getLogger("headroom")
PROBE_DECODES = 8  # tokens that a probe decodes after each load


class LeastLoaded:
    """Sends each request to the replica with the fewest requests in flight."""

    def __init__(self, replicas: Sequence[Any]) -> None:
        self.replicas = list(replicas)
        self._load = [0] * len(self.replicas)

    async def request(self, method: str, *args: Any, what: str, deadline_s: float, retries: int = 0) -> Any:
        """Call `method` on a replica; on InfraError try again `retries` times with back-off, elsewhere if possible."""
        failed: set[int] = set()  # a dead replica has no load: without this it would be chosen again
        for attempt in range(retries + 1):
            index = min(range(len(self._load)), key=lambda i: (i in failed, self._load[i]))
            self._load[index] += 1
            try:
                return await call(getattr(self.replicas[index], method).remote(*args), what, deadline_s)
            except InfraError as error:
                failed.add(index)
                if attempt == retries:
                    raise
                log.warning("%s; trying again (%d of %d)", error, attempt + 1, retries)
                await asyncio.sleep(BACK_OFF_S * 2**attempt)
            finally:
                self._load[index] -= 1
        raise AssertionError("unreachable")


class GeneratorGroup:
    """N generator replicas that serve one policy version."""

    def __init__(self, replicas: Replicas, sampling: Sampling, *, probe: Prompt, learner: "LearnerGroup") -> None:
        self._replicas = replicas
        self._sampling = sampling
        self._probe = probe
        self._learner = learner
        self._gauges: dict[str, float] = {}

    async def generate(self, prompt: Prompt) -> Group:
        """Sample one group on the least loaded replica."""
        return await self._replicas.request("generate", prompt, self._sampling, what=f"generating {prompt.uid}")

    async def load(self, weights: Weights) -> None:
        """Load `weights` on every replica, and measure how far each is from the learner on the probe."""
        began = time.monotonic()
        across = dataclasses.replace(self._probe, uid=f"mixed-v{weights.version}")
        await asyncio.gather(self._learner.send(weights), self._replicas.load(weights, across))
        self._gauges["sync/seconds"] = self._learner.publish_seconds + time.monotonic() - began
        # Training waits for these, so vLLM answers them in the same steps.
        prompt, decode, mixed = await asyncio.gather(
            self._prompt_gap(), self._decode_gap(weights.version), self._mixed_gap(across, weights.version)
        )
        self._gauges |= {"sync/logprob_gap": prompt, "rollout/behaviour_gap": decode}
        self._gauges.pop("rollout/mixed_gap", None)
        if mixed is not None:  # where the learner is the slower part, hardly any rollout of a batch spans versions
            self._gauges["rollout/mixed_gap"] = mixed

    async def _prompt_gap(self) -> float:
        """Compare every replica's log-probs of the probe's prompt with the learner's: is the load exact?"""
        ids = self._probe.token_ids
        found, expected = await asyncio.gather(self._replicas.probe("probe", ids), self._learner.probe_logprobs(ids))
        return max(float(np.abs(logprobs - expected).max()) for logprobs in found)

    async def _decode_gap(self, version: int) -> float:
        """Let one replica answer the probe and compare the log-probs it recorded: do the numerics agree?

        By construction of one version and staleness 0, which rollouts of an asynchronous run hardly ever are.
        """
        sampling = shortened(self._sampling, PROBE_DECODES)
        prompt = dataclasses.replace(self._probe, uid=f"probe-v{version}")
        group = await self._ask_one(version, "generate", prompt, sampling, probe=True)
        return await self._gap(prompt, group.rollouts[0])

    async def _mixed_gap(self, prompt: Prompt, version: int) -> float | None:
        """Compare the log-probs of an answer that spans the load, where there is one."""
        rollout = await self._ask_one(version, "spanning")
        return None if rollout is None else await self._gap(prompt, rollout)

    async def _ask_one(self, version: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Ask the replicas in turn, a version each."""
        return await self._replicas.request(
            method,
            *args,
            what="answering the probe",
            choose=lambda replicas: replicas[version % len(replicas)],
            **kwargs,
        )

    async def _gap(self, prompt: Prompt, rollout: Rollout) -> float:
        expected = await self._learner.sampled_logprobs(prompt.token_ids, rollout.token_ids)
        return float(np.abs(rollout.logprobs - expected).mean())

    def gauges(self) -> Mapping[str, float]:
        """Return what the last load took and how exact it was, and how many replicas were replaced."""
        return {**self._gauges, "generator/restarts": float(self._replicas.restarts)}

    def close(self) -> None:
        """Give up what is being replaced."""
        self._replicas.close()


class ScorerGroup:
    """Replicas of a reward or reference actor."""

    def __init__(self, name: str, replicas: Sequence[Any], *, deadline_s: float, retries: int = 1) -> None:
        self._name = name
        self._replicas = LeastLoaded(replicas)
        self._deadline_s = deadline_s
        self._retries = retries

    async def score(self, group: Group) -> Sequence[Mapping[str, Any]]:
        """Score one group on the least loaded replica."""
        return await self._replicas.request(
            "score",
            group,
            what=f"{self._name} of {group.prompt.uid}",
            deadline_s=self._deadline_s,
            retries=self._retries,
        )


class LearnerGroup:
    """The ranks of the policy, and those of the critic where the algorithm has one."""

    def __init__(
        self,
        ranks: Sequence[Any],
        critic: Sequence[Any],
        *,
        version: int,
        transport: Transport,
        deadline_s: float,
        published: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self._ranks = ranks
        self._critic = critic
        self._publish = "announce" if transport == "nccl" else "publish"
        self._deadline_s = deadline_s
        self._published = published  # called with each new version
        self.version = version
        self.publish_seconds = 0.0

    async def step(self, batch: Batch) -> StepStats:
        """Train policy and critic at once; values are computed here, so they are never stale."""
        values = (await self._each(self._critic, "values", batch))[0] if self._critic else None
        stats, critic = await asyncio.gather(
            self._each(self._ranks, "step", batch, values), self._each(self._critic, "step", batch, values)
        )
        metrics = {**stats[0].metrics, **(critic[0] if critic else {})}
        return StepStats(loss=stats[0].loss, grad_norm=stats[0].grad_norm, metrics=metrics, rng_hash=stats[0].rng_hash)

    async def publish(self) -> Weights:
        """Advance the version and publish its weights."""
        began = time.monotonic()
        weights: Weights = (await self._each(self._ranks, self._publish, self.version + 1))[0]
        self.publish_seconds = time.monotonic() - began
        self.version = weights.version
        if self._published is not None:
            await self._published(self.version)
        return weights

    async def stored(self) -> Weights:
        """Put the current version into the object store: for the first load, late joiners and the evaluator."""
        return (await self._each(self._ranks, "publish", self.version))[0]

    async def send(self, weights: Weights) -> None:
        """Broadcast announced weights; nothing to do for weights that lie in the object store."""
        if isinstance(weights.handle, Mapping):
            await self._each(self._ranks[:1], "send")

    async def probe_logprobs(self, probe: Ints) -> Floats:
        """Return the learner's own prompt log-probs of the probe, (L-1,)."""
        return (await self._each(self._ranks, "probe_logprobs", probe))[0]

    async def sampled_logprobs(self, prompt_ids: Ints, token_ids: Ints) -> Floats:
        """Return the learner's own log-probs (T,) of a completion, at the sampling temperature."""
        logprobs: Floats = (await self._each(self._ranks, "sampled_logprobs", prompt_ids, token_ids))[0]
        return logprobs

    async def raise_kl(self, factor: float, version: int, since: int) -> bool:
        """Multiply the KL coefficient on every rank alike; return False where it was done at or after `since`.

        An actor takes its calls in order, and a step reaches all ranks in one turn of this loop, as this does: it comes
        before or after a step, for policy and critic alike.
        """
        ranks = [*self._ranks, *self._critic]
        return all(await self._each(ranks, "raise_kl", factor, version, since))

    async def save(self, path: str) -> None:
        """Write every rank's engine and random state below `path`."""
        await asyncio.gather(
            self._each(self._ranks, "save", f"{path}/policy"), self._each(self._critic, "save", f"{path}/critic")
        )

    async def load(self, path: str) -> None:
        """Read what `save` wrote."""
        await asyncio.gather(
            self._each(self._ranks, "load", f"{path}/policy"), self._each(self._critic, "load", f"{path}/critic")
        )

    async def export(self, path: str) -> None:
        """Write the policy in HF format."""
        await self._each(self._ranks, "export", path)

    async def _each(self, ranks: Sequence[Any], method: str, *args: Any) -> list[Any]:
        shared = [ray.put(arg) if ranks and isinstance(arg, Batch) else arg for arg in args]
        calls = [getattr(rank, method).remote(*shared) for rank in ranks]
        return await asyncio.gather(*(call(c, f"learner {method}", self._deadline_s) for c in calls))


class EvaluatorGroup:
    """The evaluator actor, told which versions are the run's first, middle and last."""

    def __init__(self, actor: Any | None, *, steps: int, every: int, deadline_s: float) -> None:
        self._actor = actor
        self._deadline_s = deadline_s
        self._landmarks = milestones(steps, every)

    async def evaluate(self, weights: Weights) -> Sequence[Evaluation]:
        """Run the tasks due at this version."""
        if self._actor is None:
            return []
        landmark = weights.version in self._landmarks
        call_ = self._actor.evaluate.remote(weights, landmark)
        return await call(call_, f"evaluating version {weights.version}", self._deadline_s)

    async def evaluate_on(self, weights: Weights, task: str, prompts: Sequence[Prompt]) -> Evaluation:
        """Run one task on other prompts than its own; versions need not come in order."""
        if self._actor is None:
            raise ValueError(f"no evaluator for task {task}: the recipe has no evaluation.tasks")
        call_ = self._actor.evaluate_on.remote(weights, task, prompts)
        evaluation: Evaluation = await call(call_, f"evaluating version {weights.version} again", self._deadline_s)
        return evaluation


class Clocks:
    """How long each actor worked since the last reading."""

    def __init__(self, actors: Mapping[str, Any]) -> None:
        self._actors = actors  # name -> handle with `times()`: seconds busy and waiting since its start
        self._last: dict[str, float] = {}

    async def read(self) -> dict[str, float]:
        """Return `time/<actor>_busy`: seconds since the last reading, without actors that are dead or away."""
        actors = dict(self._actors)
        totals = await asyncio.gather(*(self._busy(name, actor) for name, actor in actors.items()))
        busy = {}
        for name, total in zip(actors, totals, strict=True):
            if total is not None:
                last = self._last.get(name, 0.0)
                busy[f"time/{name}_busy"] = total - last if total >= last else total  # less: another actor sits there
                self._last[name] = total
        return busy

    async def _busy(self, name: str, actor: Any) -> float | None:
        try:
            return float((await call(actor.times.remote(), f"times of {name}", 60))["busy"])
        except InfraError as error:
            log.debug("%s", error)  # whoever needs this actor will say so
            return None
