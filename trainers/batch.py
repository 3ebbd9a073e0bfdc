"""From groups to what the learner and the metrics read."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trainers.types import Batch, Floats, Group, Rollout

Number = TypeVar("Number", bound=np.generic)

TAIL = 10  # one in so many rewards is in their upper tail
MAD = 0.6745  # median absolute deviation of a normal distribution, in standard deviations


def assemble(groups: Sequence[Group], version: int) -> Batch:
    """Pad the rollouts of `groups` into one Batch for the step that trains policy `version`.

    Raises ValueError if some rollouts have reference log-probs and others have none.
    """
    rollouts = [rollout for group in groups for rollout in group.sampled]
    greedy = [rollout.reward for group in groups for rollout in group.rollouts if rollout.greedy]
    sizes = [len(group.sampled) for group in groups]
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    with_reference = {rollout.reference_logprobs is not None for rollout in rollouts}
    if len(with_reference) > 1:
        raise ValueError("some rollouts of the batch have reference log-probs and others have none")
    reference = [r.reference_logprobs for r in rollouts if r.reference_logprobs is not None]
    return Batch(
        version=version,
        uids=tuple(rollout.uid for rollout in rollouts),
        prompt_ids=tuple(group.prompt.token_ids for group in groups for _ in group.sampled),
        completion_ids=pad([r.token_ids for r in rollouts], np.int32),
        mask=np.arange(max(lengths, default=0))[None, :] < np.array(lengths)[:, None],
        behaviour_logprobs=pad([r.logprobs for r in rollouts], np.float32),
        reference_logprobs=pad(reference, np.float32) if reference else None,
        token_versions=pad([token_versions(r) for r in rollouts], np.int32),
        rewards=np.array([r.reward for r in rollouts], np.float32),
        groups=np.repeat(np.arange(len(groups), dtype=np.int32), sizes),
        greedy_rewards=np.repeat(np.array(greedy, np.float32), sizes) if greedy else None,
    )


def informative(group: Group) -> bool:
    """Whether the raw rewards of a group differ: before KL, clipping and overlong. Yu et al. 2025 (DAPO)."""
    rewards = [rollout.reward for rollout in group.sampled]
    return min(rewards) < max(rewards)


def pad(rows: Sequence[NDArray[Number]], dtype: type[Number]) -> NDArray[Number]:
    """Stack (T_i,) rows into (B, T), zeros to the right."""
    out = np.zeros((len(rows), max(map(len, rows), default=0)), dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def token_versions(rollout: Rollout) -> NDArray[np.int32]:
    """Return the policy version each token was sampled from, (T,)."""
    versions = np.zeros(len(rollout.token_ids), np.int32)
    for span in rollout.spans:
        versions[span.start : span.stop] = span.version
    return versions


def rollout_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Describe the rollouts of a step by the names of docs/metrics.md."""
    rollouts = [rollout for group in groups for rollout in group.sampled]
    staleness = [version - rollout.oldest_version for rollout in rollouts if rollout.spans] or [0]
    rewards = [r.reward for r in rollouts]
    metrics = {f"reward/{name}": value for name, value in _spread(rewards).items()}
    error, tail = clustered_se([[r.reward for r in group.sampled] for group in groups]), upper_tail(rewards)
    metrics |= {"reward/mean_se": error} if error is not None else {}
    metrics |= {"reward/tail": tail} if tail is not None else {}
    for component in rollouts[0].rewards:
        values = _spread([r.rewards[component] for r in rollouts])
        metrics |= {f"reward/{component}/{name}": value for name, value in values.items()}
    return metrics | {
        "rollout/staleness_max": float(max(staleness)),
        "rollout/staleness_mean": float(np.mean(staleness)),
        "rollout/length_mean": float(np.mean([len(r.token_ids) for r in rollouts])),
        "rollout/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }


def clustered_se(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean of all rewards, from those of each prompt; None for fewer than two prompts.

    The estimand is the mean reward of the policies that wrote the batch, over all prompts that it may be drawn from.
    What the rollouts of a prompt share is drawn once, so that prompts count, not rollouts: the standard deviation of
    their means over the square root of their number. For groups of one size it is the clustered sandwich (Liang &
    Zeger 1986) of `trainers.mismatch.from_scores`.
    """
    if len(groups) < 2:
        return None
    return float(np.std([np.mean(rewards) for rewards in groups], ddof=1) / math.sqrt(len(groups)))


def upper_tail(rewards: Sequence[float]) -> float | None:
    """Return how far the mean of the highest tenth of B rewards lies above the median, in robust standard deviations.

    1.75 in a large normal batch. A few completions that found what the reward likes too much raise it before they move
    the mean. The unit is the median absolute deviation over 0.6745 (Hampel 1974): those few inflate a standard
    deviation, and hide in it. None where it is 0: more than half of the rewards are equal.
    """
    values = np.sort(rewards)
    middle = np.median(values)
    unit = np.median(np.abs(values - middle)) / MAD
    highest = values[len(values) - math.ceil(len(values) / TAIL) :]
    return float((highest.mean() - middle) / unit) if unit > 0 else None


def disagreement(rollouts: Sequence[Rollout], weights: Mapping[str, float], first: Mapping[str, float]) -> float | None:
    """Return how far reward models disagree: the standard deviation of their scores of a rollout, mean over rollouts.

    `weights` are those of the reward models by component; a score of negative weight is turned over. Each is measured
    from its mean and in its spread over the run's first batch, by that batch's metrics `first`: within each batch, a
    policy that learned to please one model more than another would not show. None for fewer than two models, and where
    one of them gave all of the first batch the same score.
    """
    scores = []
    for name, weight in weights.items():
        mean, spread = first[f"reward/{name}/mean"], first[f"reward/{name}/std"]
        if spread <= 1e-12 * abs(mean):
            return None
        scores.append([math.copysign(1, weight) * (rollout.rewards[name] - mean) / spread for rollout in rollouts])
    return float(np.std(scores, axis=0, ddof=1).mean()) if len(scores) > 1 else None


def _spread(values: Sequence[float] | Floats) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}
