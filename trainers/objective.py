"""The loss of each token: the algorithm's own, weighted by importance, and the KL term where it stands in the loss."""

from functools import partial

import torch
from torch import Tensor

from configs import schema
from trainers.algorithms import ALGORITHMS, LossInputs
from trainers.importance import importance_weights
from trainers.losses import kl_estimate
from trainers.targets import Targets
from trainers.types import Batch, Floats


def token_losses(
    batch: Batch,
    rows: list[int],
    towards: Targets,
    config: schema.Algorithm,
    coefficient: float,
    logprobs: Tensor,
    proximal: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each token (b, T) of the b rollouts `rows`, and what is counted of it.

    logprobs (b, T) of the current policy, with gradient; proximal (b, T) of the learner before the step; those of the
    behaviour policy and of the reference are in the batch, whose padding may hold anything. coefficient: of the KL
    term. Raises ValueError if that has no reference log-probs, FloatingPointError for a loss that is not finite.
    """
    here = partial(torch.tensor, device=logprobs.device)
    mask = here(batch.mask[rows])

    def inside(of: Floats) -> Tensor:
        return here(of[rows]).where(mask, 0)

    behaviour = inside(batch.behaviour_logprobs)
    reference = None if batch.reference_logprobs is None else inside(batch.reference_logprobs)
    outputs = ALGORITHMS[config.name].loss(
        LossInputs(
            logprobs=logprobs,
            proximal=proximal if config.proximal == "recompute" else behaviour,
            advantages=towards.outputs.advantages[rows].to(logprobs.device),
            mask=mask,
            rewards=towards.rewards[rows].to(logprobs.device),
            groups=here(batch.groups[rows]),
            reference=reference,
            beta=coefficient,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ratio=config.ratio,
            labels=config.pair_labels,
        )
    )
    importance = importance_weights(proximal, behaviour, mask, **config.off_policy.model_dump())
    in_ratio = config.proximal == "behaviour"  # the surrogate's ratio holds the weights already
    loss = outputs.loss * (~importance.masked if in_ratio else importance.weights)
    if config.kl.where == "loss" and coefficient > 0:
        if reference is None:
            raise ValueError("a KL term in the loss needs reference log-probs, and the batch has none")
        # Weighted too: its expectation is over the policy's tokens, and these are another's.
        loss = loss + coefficient * kl_estimate(logprobs, reference, config.kl.estimator) * importance.weights
    _check_finite(loss, mask, [batch.uids[row] for row in rows])
    counted = {
        "tokens": mask,
        "clipped": outputs.clipped & mask,
        "weight": importance.weights,
        "weight_squared": importance.weights.square(),
        "truncated": importance.truncated,
        "masked": importance.masked,
    }
    return loss, counted


def _check_finite(loss: Tensor, mask: Tensor, uids: list[str]) -> None:
    """Raise FloatingPointError naming the first sample with a loss that is not finite: no weights may be made of it."""
    bad = (~loss.detach().isfinite() & mask).any(1)
    if bool(bad.any()):
        uid = uids[int(bad.nonzero()[0])]
        raise FloatingPointError(
            f"sample {uid}: its loss is not a finite number, so the policy's log-probs are not or overflow"
        )
