"""The frozen policy that KL terms measure from."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from actors.batching import Batcher
from configs.schema import Reference
from trainers.layout import tree_width
from trainers.models import DType, PolicyModel, completion_logprobs, load_policy
from trainers.types import Floats, Group, Ints


class ReferenceActor:
    """Adds reference log-probs at the sampling temperature; made a Ray actor by `cluster/`."""

    def __init__(
        self, path: str, reference: Reference, dtype: DType, temperature: float, threads: int | None = None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._dtype = dtype
        self._model = self._load(path)
        self._width = tree_width(self._model.hf) if reference.share_prompts else None
        self._temperature = temperature
        self._token_budget = reference.token_budget
        self._batcher: Batcher[tuple[Ints, Ints], Floats] = Batcher(self._logprobs)

    async def ready(self) -> bool:
        """Answer once the model is loaded."""
        return True

    async def load(self, path: str) -> None:
        """Measure from the policy at `path` from now on; what is being computed still is from the old one."""
        self._model = await asyncio.to_thread(self._load, path)

    async def score(self, group: Group) -> list[dict[str, Any]]:
        """Return {"reference_logprobs": (T,)} per rollout."""
        items = [(group.prompt.token_ids, rollout.token_ids) for rollout in group.rollouts]
        return [{"reference_logprobs": logprobs} for logprobs in await self._batcher.submit(items)]

    async def times(self) -> dict[str, float]:
        """Seconds busy and waiting since the start."""
        return self._batcher.times()

    def _load(self, path: str) -> PolicyModel:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_policy(path, self._dtype).to(device).eval()

    def _logprobs(self, items: Sequence[tuple[Ints, Ints]]) -> list[Floats]:
        prompts, completions = zip(*items, strict=True)
        return completion_logprobs(
            self._model, prompts, completions, self._temperature, self._token_budget, width=self._width
        )
