"""What the supervised trainings minimise: per row a loss, its weight, and whether the model is right about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from trainers.layout import sequences
from trainers.preferences import bradley_terry_loss, dpo_loss, ipo_loss, kwise_loss, order_share
from trainers.types import Ints

Rows = Sequence[tuple[Ints, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What `fit` minimises: the sum of `losses` over rows, divided by the sum of their weights."""

    lengths: Sequence[int]  # padded tokens that a row takes in the longest place of a micro-batch
    weights: Sequence[float]  # per row: its tokens, or 1
    losses: Callable[[nn.Module, Sequence[int]], tuple[Tensor, Tensor]]  # rows -> loss (b,), share that is right (b,)


def sft_objective(rows: Rows) -> Objective:
    """Negative log-likelihood of completions, mean over tokens. rows: (prompt (P,), completion (T,))."""

    def losses(model: nn.Module, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        batch = sequences([rows[i][0] for i in chosen], [rows[i][1] for i in chosen], _device(model))
        logprobs, _ = model(batch)
        return -logprobs.sum(1), torch.zeros(len(chosen))

    return Objective(
        lengths=[len(prompt) + len(completion) for prompt, completion in rows],
        weights=[float(len(completion)) for _, completion in rows],
        losses=losses,
    )


def reward_objective(rows: Rows, *, tree: bool, margins: Sequence[float] | None = None) -> Objective:
    """Bradley-Terry over all pairs of a ranking, mean over its pairs; with margins, of pairs only.

    rows: K texts (T_k,) of one prompt, best first; K may differ. All K are scored in one forward pass, once each.
    tree: they lie in one row behind what they share at the start. Right is the share of pairs in the ranking's order.
    """
    shared = [shared_length(texts) for texts in rows]

    def losses(model: nn.Module, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        sizes = [len(rows[i]) for i in chosen]
        prompts = [rows[i][0][: shared[i]] for i in chosen for _ in rows[i]]
        rests = [text[shared[i] :] for i in chosen for text in rows[i]]
        device = _device(model)
        each = model(sequences(prompts, rests, device, bundles=sizes if tree else None))
        mask = torch.arange(max(sizes), device=device) < torch.tensor(sizes, device=device)[:, None]
        scores = torch.zeros(mask.shape, device=device).masked_scatter(mask, each)
        right = order_share(scores, mask)
        if margins is None:
            return kwise_loss(scores, mask), right
        margin = torch.tensor([margins[i] for i in chosen], device=device)
        return bradley_terry_loss(scores[:, 0], scores[:, 1], margin=margin), right

    longest = [max(map(len, texts)) for texts in rows]
    if len(set(map(len, rows))) > 1:  # a row of many short texts may be padded to a longer one of few
        longest = [max(longest)] * len(rows)
    lengths = [
        sum(map(len, texts)) - (len(texts) - 1) * both if tree else len(texts) * most
        for texts, both, most in zip(rows, shared, longest, strict=True)
    ]
    return Objective(lengths=lengths, weights=[1.0] * len(rows), losses=losses)


def dpo_objective(
    rows: Rows,
    reference: Tensor,
    *,
    tree: bool,
    loss: Literal["dpo", "ipo"],
    beta: float,
    label_smoothing: float = 0.0,
    length_normalisation: bool = False,
) -> Objective:
    """DPO, cDPO or IPO on pairs. rows: (prompt (P,), chosen (C,), rejected (R,)).

    reference (n, 2): log-probs of both completions under the start weights. length_normalisation: log-ratios are means
    over tokens, not sums. tree as for `reward_objective`. Right is whether the log-ratio of the chosen one is greater.
    """
    counts = torch.tensor([[len(text) for text in texts[1:]] for texts in rows]).clamp(min=1)
    of_loss = {"dpo": dpo_loss, "ipo": ipo_loss}[loss]

    def losses(model: nn.Module, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        device = _device(model)
        at = list(chosen)
        ratios = pair_logprobs(model, rows, chosen, tree=tree) - reference[at].to(device)
        if length_normalisation:
            ratios = ratios / counts[at].to(device)
        difference = ratios[:, 0] - ratios[:, 1]
        return of_loss(difference, beta, label=1 - label_smoothing), (difference > 0).float()

    return Objective(lengths=pair_lengths(rows, tree=tree), weights=[1.0] * len(rows), losses=losses)


def pair_logprobs(model: nn.Module, rows: Rows, chosen: Sequence[int], *, tree: bool) -> Tensor:
    """Return the log-probs (b, 2) of both completions of the rows `chosen`, summed over tokens; rows as for DPO."""
    prompts = [rows[i][0] for i in chosen for _ in range(2)]
    completions = [text for i in chosen for text in rows[i][1:]]
    batch = sequences(prompts, completions, _device(model), bundles=[2] * len(chosen) if tree else None)
    logprobs, _ = model(batch)
    sums: Tensor = logprobs.sum(1)
    return sums.view(-1, 2)


def pair_lengths(rows: Rows, *, tree: bool) -> list[int]:
    """Return the padded tokens that each row of DPO takes: both completions behind one prompt, or one row each."""
    return [len(prompt) + len(a) + len(b) if tree else 2 * (len(prompt) + max(len(a), len(b))) for prompt, a, b in rows]


def shared_length(texts: Sequence[Ints]) -> int:
    """Return how many tokens all of `texts` have in common at the start."""
    size = min(map(len, texts))
    heads = np.stack([np.asarray(text)[:size] for text in texts])
    different = np.flatnonzero((heads != heads[0]).any(0))
    return int(different[0]) if len(different) else size


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
