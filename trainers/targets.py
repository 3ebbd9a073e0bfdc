"""What one batch is trained towards: computed alike on every rank, by the policy's learner and by the critic's."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs import schema
from trainers.algorithms import ALGORITHMS, AdvantageInputs, AdvantageOutputs
from trainers.kl import adapt
from trainers.losses import kl_estimate
from trainers.types import Batch, Floats


@dataclass(slots=True, kw_only=True)
class KLCoefficient:
    """The strength of the KL term, which follows a target if the recipe has one.

    It depends on the batches seen and on nothing else, so policy and critic have the same without talking.
    """

    config: schema.KL
    value: float

    def observe(self, batch: Batch) -> None:
        """Adapt to the KL of `batch`, in nats per rollout."""
        if self.config.target is None or batch.reference_logprobs is None:
            return
        log_ratio = np.where(batch.mask, batch.behaviour_logprobs - batch.reference_logprobs, 0)
        observed = float(log_ratio.sum(1).mean())
        self.value = adapt(self.value, observed, self.config.target, self.config.horizon, len(batch.uids))


def advantages(batch: Batch, config: schema.Algorithm, coefficient: float, values: Floats | None) -> AdvantageOutputs:
    """Return the advantages (B, T) of the whole batch, and the returns of an algorithm with a critic.

    The KL in the reward is that of the policy that sampled. Raises ValueError if it has no reference log-probs.
    """
    in_reward = config.kl.where == "reward" and coefficient > 0
    kl = None
    if in_reward:
        if batch.reference_logprobs is None:
            raise ValueError("a KL term in the reward needs reference log-probs, and the batch has none")
        sampled, reference = torch.tensor(batch.behaviour_logprobs), torch.tensor(batch.reference_logprobs)
        kl = kl_estimate(sampled, reference, "k1")
    return ALGORITHMS[config.name].advantages(
        AdvantageInputs(
            rewards=torch.tensor(batch.rewards),
            groups=torch.tensor(batch.groups),
            mask=torch.tensor(batch.mask),
            kl=kl,
            kl_coefficient=coefficient if in_reward else 0.0,
            values=None if values is None else torch.tensor(values),
            gamma=config.gamma,
            lam=config.lam,
            divide_by_std=config.divide_by_std,
        )
    )


def minibatches(batch: Batch, epochs: int, number: int, generator: np.random.Generator) -> Iterator[list[int]]:
    """Yield the rollouts of each optimizer step: every epoch deals all of them anew into `number` parts."""
    for _ in range(epochs):
        for part in np.array_split(generator.permutation(len(batch.uids)), number):
            yield [int(row) for row in part]


def lengths(batch: Batch) -> list[int]:
    """Return prompt and completion tokens of each rollout."""
    return [len(prompt) + int(n) for prompt, n in zip(batch.prompt_ids, batch.mask.sum(1), strict=True)]


def completions(batch: Batch, rows: list[int] | tuple[int, ...]) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Return the completion tokens (T_i,) of `rows`, without padding."""
    return [batch.completion_ids[row][batch.mask[row]] for row in rows]


def masked_mean(x: Tensor, mask: Tensor) -> float | None:
    """Return the mean of `x` where `mask`, or None if that is nowhere."""
    return float(x[mask].double().mean()) if bool(mask.any()) else None
