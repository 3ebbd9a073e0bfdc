"""Losses on comparisons: pure functions of scores or log-ratios, shared by offline training and online pairs.

Label p is the probability that the first of a pair is the better one: 1 what an annotator said, 1 - epsilon if they err
at that rate, anything between for soft labels. Losses are per row, unreduced, in nats (ipo: nats squared).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, label: float | Tensor = 1.0
) -> Tensor:
    """Return -p log sigmoid(chosen - rejected - margin) - (1 - p) log sigmoid(rejected - chosen - margin), shape (b,).

    chosen, rejected: scores (b,); margin (b,): by how much the better one is to be ahead, default 0. Bradley & Terry
    1952; Ouyang et al. 2022, eq. 1 for a pair; margin: Touvron et al. 2023 (Llama 2), eq. 2. Lambert & Calandra 2023
    print eq. 1 with the other sign, which would push the chosen one down; their next sentence says what is meant.
    """
    ahead = chosen - rejected
    if margin is None:
        margin = torch.zeros_like(ahead)
    return -(label * F.logsigmoid(ahead - margin) + (1 - label) * F.logsigmoid(-ahead - margin))


def kwise_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the mean Bradley-Terry loss over all pairs of each ranking, shape (B,); 0 for one without a pair.

    scores (B, K): best first; mask (B, K): false where a ranking has fewer. Ouyang et al. 2022, eq. 1.
    """
    better, worse, counts = _pairs(scores, mask)
    return (bradley_terry_loss(better, worse) * counts).sum(1) / counts.sum(1).clamp(min=1)


def order_share(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the share of each ranking's pairs that `scores` put in its order, shape (B,); a tie counts as wrong.

    scores (B, K): best first; mask (B, K) as for `kwise_loss`.
    """
    better, worse, counts = _pairs(scores, mask)
    return ((better > worse) & counts).sum(1) / counts.sum(1).clamp(min=1)


def dpo_loss(log_ratio_difference: Tensor, beta: float, *, label: float | Tensor = 1.0) -> Tensor:
    """Return -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h), shape (b,).

    log_ratio_difference h (b,): log pi/pi0 of the first completion less the second's. Rafailov et al. 2023, eq. 7;
    p = 1 - epsilon is cDPO (Mitchell 2023, A note on DPO with noisy preferences). With p of a Bradley-Terry
    model of r over all pairs the minimiser is pi* ∝ pi0 exp(r / beta).
    """
    scaled = beta * log_ratio_difference
    return bradley_terry_loss(scaled, torch.zeros_like(scaled), label=label)


def ipo_loss(log_ratio_difference: Tensor, beta: float, *, label: float | Tensor = 1.0) -> Tensor:
    """Return (h - (2 p - 1) / (2 beta))^2, shape (b,).

    log_ratio_difference h as for `dpo_loss`. Azar et al. 2023, eq. 17, whose tau is beta; for soft labels the mean over
    both labels, up to a constant. The minimiser is finite though all labels agree, where that of `dpo_loss` is not.
    """
    return (log_ratio_difference - (2 * label - 1) / (2 * beta)).square()


def _pairs(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores of the better and the worse of each pair, and which pairs there are, all (B, K (K - 1) / 2)."""
    size = scores.shape[1]
    first, second = torch.triu_indices(size, size, offset=1, device=scores.device)
    scores = scores.masked_fill(~mask, 0.0)  # whatever lies there must not reach the gradient
    return scores[:, first], scores[:, second], mask[:, first] & mask[:, second]
