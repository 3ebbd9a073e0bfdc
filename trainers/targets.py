"""What one batch is trained towards: computed alike on every rank, by the policy's learner and by the critic's."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs import schema
from trainers import microbatch
from trainers.algorithms import ALGORITHMS, AdvantageInputs, AdvantageOutputs
from trainers.kl import adapt
from trainers.layout import Sequences, sequences
from trainers.losses import kl_estimate
from trainers.microbatch import MicroBatch, bundle
from trainers.types import Batch, Floats


@dataclass(slots=True, kw_only=True)
class KLCoefficient:
    """The strength of the KL term, which follows a target if the recipe has one.

    It depends on the batches seen and on what it was raised by, so policy and critic have the same without talking.
    """

    config: schema.KL
    value: float
    raised: float = 1.0  # product of the factors of `raise_by`
    raised_at: int | None = None  # evaluated version at which it was raised last

    def observe(self, batch: Batch) -> None:
        """Adapt to the KL of `batch`, in nats per rollout."""
        if self.config.target is None or batch.reference_logprobs is None:
            return
        log_ratio = np.where(batch.mask, batch.behaviour_logprobs - batch.reference_logprobs, 0)
        observed = float(log_ratio.sum(1).mean())
        target = self.config.target / self.raised**2
        self.value = adapt(self.value, observed, target, self.config.horizon, len(batch.uids))

    def raise_by(self, factor: float, *, version: int, since: int) -> bool:
        """Multiply the coefficient, because of the evaluation of `version`, and return whether that was done.

        Not twice at or after version `since`: the same fall is told by every later evaluation, and again after a
        resume. A target is divided by the square, or it would take the raise back: for small steps away from the
        reference the optimum π₀·exp(r/β) has the KL Var(r) / (2 β²).
        """
        if self.raised_at is not None and self.raised_at >= since:
            return False
        self.value *= factor
        self.raised *= factor
        self.raised_at = version
        return True


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


def plan(batch: Batch, rows: list[int], token_budget: int, ranks: int, *, width: int | None) -> list[list[MicroBatch]]:
    """Return the micro-batches of each rank for the rollouts `rows`; width as `layout.tree_width` gives it."""
    lengths = [int(n) for n in batch.mask.sum(1)]
    bundles = bundle(rows, batch.prompt_ids, lengths, token_budget, ranks, width=width)
    return microbatch.plan(bundles, token_budget, ranks)


def inputs(batch: Batch, micro: MicroBatch, device: torch.device) -> Sequences:
    """Return the rollouts of a micro-batch as a model takes them, T being that of the whole batch."""
    return sequences(
        [batch.prompt_ids[row] for row in micro.rows],
        [batch.completion_ids[row][batch.mask[row]] for row in micro.rows],
        device,
        bundles=micro.bundles,
        width=batch.mask.shape[1],
    )


def masked_mean(x: Tensor, mask: Tensor) -> float | None:
    """Return the mean of `x` where `mask`, or None if that is nowhere."""
    return float(x[mask].double().mean()) if bool(mask.any()) else None
