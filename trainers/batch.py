"""From groups to what the learner and the metrics read."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trainers.types import Batch, Floats, Group, Rollout

Number = TypeVar("Number", bound=np.generic)


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
    staleness = [version - rollout.oldest_version for rollout in rollouts]
    metrics = {f"reward/{name}": value for name, value in _spread([r.reward for r in rollouts]).items()}
    for component in rollouts[0].rewards:
        values = _spread([r.rewards[component] for r in rollouts])
        metrics |= {f"reward/{component}/{name}": value for name, value in values.items()}
    return metrics | {
        "rollout/staleness_max": float(max(staleness)),
        "rollout/staleness_mean": float(np.mean(staleness)),
        "rollout/length_mean": float(np.mean([len(r.token_ids) for r in rollouts])),
        "rollout/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }


def _spread(values: Sequence[float] | Floats) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}
