"""Small batches worked by hand, and what each algorithm's advantages are of the first one."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import schema
from trainers.algorithms import AdvantageInputs
from trainers.types import Batch

MASK = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
KL = torch.tensor([[1.0, 1.0], [-2.0, 99.0], [0.0, 99.0], [1.0, 1.0]])
INPUTS = AdvantageInputs(
    rewards=torch.tensor([4.0, 1.0, 2.0, 2.0]),
    groups=torch.tensor([5, 5, 3, 3]),
    mask=MASK,
    kl=KL,
    kl_coefficient=0.5,  # rewards less the KL: 3, 2 and 2, 1
    values=torch.zeros(4, 2),
    greedy=torch.tensor([1.0, 1.0, 0.0, 0.0]),
    lam=1.0,
)
TO_GO = [[3.0, 3.5], [2.0, 0.0], [2.0, 0.0], [1.0, 1.5]]
BY_HAND: dict[str, list[Any]] = {
    "grpo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],  # ± 0.5 in each group, by its deviation 0.5
    "dapo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],
    "gspo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],
    "cispo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],
    "dr_grpo": [[0.5, 0.5], [-0.5, 0.0], [0.5, 0.0], [-0.5, -0.5]],
    "rloo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],  # 3 - 2, 2 - 3, ...
    "reinforce_pp_baseline": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],  # ± 0.5 by the batch's 0.5
    "remax": [[2.0, 2.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]],
    "reinforce_pp": TO_GO,  # less their mean 13/6, by their deviation
    "ppo": TO_GO,  # with a critic that says 0 and lam = 1
    "rft": [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]],
    "online_dpo": [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]],  # the second group's rewards are equal
    "online_ipo": [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
}


def expected(name: str) -> Tensor:
    """The advantages (4, 2) of INPUTS."""
    found = torch.tensor(BY_HAND[name])
    if name not in ("reinforce_pp", "ppo"):
        return found
    inside = found[MASK]
    return torch.where(MASK, (found - inside.mean()) / inside.std(correction=0), torch.zeros(4, 2))


def batch_of(
    behaviour: Any, reference: Any, mask: Tensor, rewards: Any, groups: Any = None, greedy: Any = None
) -> Batch:
    """A batch in float64 from what matters of it: log-probs (B, T), rewards (B,); one group by default."""
    rows = len(rewards)

    def array(x: Any) -> Any:
        return torch.as_tensor(x).to(torch.float64).numpy()

    return Batch(
        version=0,
        uids=tuple(f"s{row}" for row in range(rows)),
        prompt_ids=(),
        completion_ids=np.zeros(mask.shape, np.int32),
        mask=mask.numpy(),
        behaviour_logprobs=array(behaviour),
        reference_logprobs=array(reference),
        token_versions=np.zeros(mask.shape, np.int32),
        rewards=array(rewards),
        groups=np.zeros(rows, np.int32) if groups is None else torch.as_tensor(groups).to(torch.int32).numpy(),
        greedy_rewards=None if greedy is None else array(greedy),
    )


def section(name: str, **options: Any) -> schema.Algorithm:
    """The recipe's section of an algorithm, with its own defaults."""
    return schema.Algorithm.model_validate({"name": name, **options})


def padded_with(batch: Batch, what: str, junk: float) -> Batch:
    """The batch with `junk` beyond the completions in one of its arrays (B, T)."""
    return replace(batch, **{what: np.where(batch.mask, getattr(batch, what), junk)})
