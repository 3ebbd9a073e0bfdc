"""The actor that samples groups with vLLM."""

import asyncio

from actors.engine import EngineOptions, EngineStats, shortened
from actors.weight_sync import Mailbox, NcclGroup, fetch, load_weights
from trainers.types import Floats, Group, Ints, Prompt, Rollout, Sampling, Weights

PROBE_TOKENS = 16  # of an answer that is to span a load: enough to be unfinished when vLLM has paused


class Generator:
    """The actor that samples groups for the loop; `cluster` wraps it with ray.remote."""

    def __init__(self, options: EngineOptions, sampling: Sampling) -> None:
        from actors.vllm_engine import Engine  # here, for the driver names this class and needs no vllm

        self._engine = Engine(options)
        self._sampling = sampling
        self._mailbox = Mailbox(options.run)
        self._answer: asyncio.Task[Rollout | None] | None = None

    async def start(self) -> None:
        """Start vLLM; see `Engine.start`."""
        await self._engine.start()

    async def generate(self, prompt: Prompt, sampling: Sampling | None = None, *, probe: bool = False) -> Group:
        """Sample one group; see `Engine.generate` for the errors."""
        return await self._engine.generate(prompt, sampling or self._sampling, probe=probe)

    async def load(self, weights: Weights, probe: Prompt | None = None) -> None:
        """Sample from `weights` from now on; see `Engine.load` for the errors.

        With a `probe`, `spanning` then has an answer to it that was begun before the load; never where loads drain.
        """
        in_flight = self._engine.options.update == "in_flight" and 0 <= self._engine.version < weights.version
        if probe is None or not in_flight:
            await load_weights(self._engine, weights, self._mailbox)
            return
        await fetch(weights, self._mailbox)  # or the probe would be over before the load begins
        load = load_weights(self._engine, weights, self._mailbox)
        self._answer = await self._engine.across(probe, shortened(self._sampling, PROBE_TOKENS), load)

    async def spanning(self) -> Rollout | None:
        """Return, once, the answer that spans the last load, if there is one; see `Engine.generate` for the errors."""
        answer, self._answer = self._answer, None
        return await answer if answer else None

    async def join(self, group: NcclGroup, rank_offset: int) -> None:
        """Enter the learner's nccl group."""
        await self._engine.join(group, rank_offset)

    async def probe(self, token_ids: Ints) -> Floats:
        """Return (L-1,) prompt log-probs under the loaded weights."""
        return await self._engine.probe(token_ids)

    async def check(self) -> int:
        """Return the loaded version. Raises InfraError if vLLM died."""
        await self._engine.check()
        return self._engine.version

    async def stats(self) -> EngineStats:
        """Return what was counted since the start."""
        return self._engine.snapshot()

    async def times(self) -> dict[str, float]:
        """Return the seconds with and without a request in the engine, since the start."""
        stats = self._engine.snapshot()
        return {"busy": stats.busy_s, "waiting": stats.waiting_s}

    async def close(self) -> None:
        """End vLLM and remove this run's files from shared memory."""
        self._engine.close()
        self._mailbox.close()
