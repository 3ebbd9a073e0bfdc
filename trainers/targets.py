"""What one batch is trained towards: computed alike on every rank, by the policy's learner and by the critic's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs import schema
from trainers import microbatch
from trainers.advantages import overlong_penalty
from trainers.algorithms import ALGORITHMS, AdvantageInputs, AdvantageOutputs
from trainers.kl import adapt
from trainers.layout import Sequences, sequences
from trainers.losses import kl_estimate
from trainers.microbatch import MicroBatch, bundle, together
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


@dataclass(slots=True, kw_only=True)
class RewardShaping:
    """What becomes of the rewards before anything is computed from them.

    It depends on the batches seen, each once, so policy and critic have the same without talking.
    """

    config: schema.Algorithm
    max_tokens: int  # sampling.max_tokens
    count: int = 0  # rewards seen
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def observe(self, batch: Batch) -> None:
        """Take the rewards of `batch` into the running mean and deviation. Chan et al. 1979."""
        if self.config.reward_scale == "none":
            return
        rewards = batch.rewards.astype(np.float64)
        number, distance = len(rewards), float(rewards.mean()) - self.mean
        total = self.count + number
        self.squares += float(rewards.var()) * number + distance**2 * self.count * number / total
        self.mean += distance * number / total
        self.count = total

    def shaped(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        """Return the rewards (B,) of completions of `lengths` (B,) tokens: scaled, clipped, less what is overlong.

        Scaling and clipping: Zheng et al. 2023 (Secrets of RLHF I).
        """
        if self.count:
            rewards = (rewards - self.mean) / math.sqrt(self.squares / self.count + 1e-8)
        if self.config.reward_clip is not None:
            rewards = rewards.clamp(-self.config.reward_clip, self.config.reward_clip)
        if (overlong := self.config.overlong) is not None:
            cost = overlong_penalty(lengths, self.max_tokens, share=overlong.share, penalty=overlong.penalty)
            rewards = rewards - cost
        return rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What one batch is trained towards."""

    rewards: Tensor  # (B,) shaped
    outputs: AdvantageOutputs
    units: tuple[tuple[int, ...], ...]  # rollouts that must meet in one micro-batch; what is in none is not trained on


def targets(
    batch: Batch, config: schema.Algorithm, coefficient: float, shaping: RewardShaping, values: Floats | None
) -> Targets:
    """Return what the whole batch is trained towards, `values` (B, T) being the critic's if there is one.

    The KL in the reward is that of the policy that sampled. Raises ValueError if it has no reference log-probs,
    FloatingPointError for a number that is not finite, naming the sample.
    """
    _check_finite(batch, values)
    in_reward = config.kl.where == "reward" and coefficient > 0
    kl = None
    if in_reward:
        if batch.reference_logprobs is None:
            raise ValueError("a KL term in the reward needs reference log-probs, and the batch has none")
        sampled, reference = torch.tensor(batch.behaviour_logprobs), torch.tensor(batch.reference_logprobs)
        kl = kl_estimate(sampled, reference, "k1")
    mask = torch.tensor(batch.mask)
    rewards = shaping.shaped(torch.tensor(batch.rewards), mask.sum(1))
    greedy = batch.greedy_rewards
    outputs = ALGORITHMS[config.name].advantages(
        AdvantageInputs(
            rewards=rewards,
            groups=torch.tensor(batch.groups),
            mask=mask,
            kl=kl,
            kl_coefficient=coefficient if in_reward else 0.0,
            values=None if values is None else torch.tensor(values),
            greedy=None if greedy is None else shaping.shaped(torch.tensor(greedy), torch.zeros(len(greedy))),
            gamma=config.gamma,
            lam=config.lam,
            normalise=config.normalise,
            best=config.best,
        )
    )
    return Targets(rewards=rewards, outputs=outputs, units=_units(batch, config, outputs.chosen))


def _units(batch: Batch, config: schema.Algorithm, chosen: Tensor | None) -> tuple[tuple[int, ...], ...]:
    rows = range(len(batch.uids)) if chosen is None else torch.nonzero(chosen)[:, 0].tolist()
    if config.kl.where != "pairs":
        return tuple((row,) for row in rows)
    of_group: dict[int, list[int]] = {}
    for row in rows:
        of_group.setdefault(int(batch.groups[row]), []).append(row)
    return tuple(map(tuple, of_group.values()))


def _check_finite(batch: Batch, values: Floats | None) -> None:
    """Raise FloatingPointError naming the first sample with a number that is not finite."""
    arrays: dict[str, Floats | None] = {
        "reward": batch.rewards,
        "greedy reward": batch.greedy_rewards,
        "behaviour log-prob": batch.behaviour_logprobs,
        "reference log-prob": batch.reference_logprobs,
        "critic's value": values,
    }
    for what, array in arrays.items():
        if array is None:
            continue
        bad = ~np.isfinite(array) if array.ndim == 1 else (~np.isfinite(array) & batch.mask).any(1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise FloatingPointError(f"sample {batch.uids[row]}: its {what} is not a finite number")


def minibatches(
    units: Sequence[tuple[int, ...]], epochs: int, number: int, generator: np.random.Generator
) -> Iterator[list[tuple[int, ...]]]:
    """Yield the units of each optimizer step: every epoch deals all of them anew into `number` parts, none empty."""
    for _ in range(epochs):
        for part in np.array_split(generator.permutation(len(units)), number):
            if len(part):
                yield [units[int(place)] for place in part]


def plan(
    batch: Batch, units: Sequence[tuple[int, ...]], token_budget: int, ranks: int, *, width: int | None
) -> list[list[MicroBatch]]:
    """Return the micro-batches of each rank for the rollouts of `units`; width as `layout.tree_width` gives it."""
    lengths = [int(n) for n in batch.mask.sum(1)]
    if all(len(unit) == 1 for unit in units):
        rows = [row for (row,) in units]
        bundles = bundle(rows, batch.prompt_ids, lengths, token_budget, ranks, width=width)
    else:
        bundles = [together(unit, batch.prompt_ids, lengths, shared=width is not None) for unit in units]
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
