"""Importance weights of rollouts that another policy sampled: older weights, or another engine's numerics.

Three policies, never mixed: *behaviour* sampled the tokens, *proximal* is the learner before the step, *current* is the
learner during it. Weights are proximal / behaviour; clipping is about current / proximal. Hilton et al. 2022, Batch
size-invariance for policy optimization; Fu et al. 2025, AReaL (both call this the decoupled objective).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeights:
    """What each token's loss is multiplied with, and what bounding did to it."""

    weights: Tensor  # (B, T) without gradient, 0 outside the mask and where masked
    truncated: Tensor  # (B, T) true where a bound lowered the weight
    masked: Tensor  # (B, T) true where a token of the mask is not trained on


def level_log_ratio(log_ratio: Tensor, mask: Tensor, level: Level) -> Tensor:
    """Return per token the log ratio of the token, of its completion, or the mean over its completion's tokens.

    log_ratio (B, T) of tokens -> (B, T), 0 outside the mask.
    """
    inside = torch.where(mask, log_ratio, torch.zeros_like(log_ratio))
    if level == "token":
        return inside
    total = inside.sum(1, keepdim=True)
    if level == "geometric":
        total = total / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, total, torch.zeros_like(inside))


def importance_weights(
    proximal: Tensor,
    behaviour: Tensor,
    mask: Tensor,
    *,
    weight: Literal["none", "truncate", "mask"],
    level: Level,
    cap: float,
    floor: float = 0.0,
    reject_below: float | None = None,
) -> ImportanceWeights:
    """Return the weights proximal / behaviour policy of the tokens, from log-probs (B, T).

    truncate: bounded by `cap`, which trades variance for bias (Ionides 2008; Espeholt et al. 2018). mask: 0 outside
    [floor, cap]. none: 1. reject_below: a completion with a token whose own ratio is below it has weight 0. Of the
    levels only `sequence` without a bound makes the gradient of the reward of whole completions unbiased; `token`
    leaves out how likely the tokens before were, and the geometric mean is no importance weight: it says how far off a
    completion is.
    """
    mask = mask.bool()
    log_ratio = (proximal - behaviour).detach()
    of_level = level_log_ratio(log_ratio, mask, level)
    ones, nowhere = mask.to(log_ratio.dtype), torch.zeros_like(mask)
    truncated, masked = nowhere, nowhere
    match weight:
        case "none":
            weights = ones
        case "truncate":
            # Capped before the exponential, so that it cannot overflow.
            weights = of_level.clamp(max=math.log(cap)).exp() * ones
            truncated = mask & (of_level > math.log(cap))
        case "mask":
            low = math.log(floor) if floor > 0 else -math.inf
            masked = mask & ((of_level > math.log(cap)) | (of_level < low))
            weights = of_level.clamp(max=math.log(cap)).exp() * ones
    if reject_below is not None:
        outlier = (mask & (log_ratio < math.log(reject_below))).any(1, keepdim=True)
        masked = masked | (mask & outlier)
    return ImportanceWeights(
        weights=torch.where(masked, torch.zeros_like(weights), weights), truncated=truncated & ~masked, masked=masked
    )


def effective_share(total: float, squares: float, count: float) -> float:
    """Return (Σw)² / (N·Σw²): the share of N samples that would say as much with equal weights. Kish 1965.

    total = Σw, squares = Σw². 0 if all weights are 0.
    """
    return total * total / (count * squares) if squares > 0 and count > 0 else 0.0
