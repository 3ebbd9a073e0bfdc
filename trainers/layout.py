"""How texts lie in the rows of a forward pass: one after the other behind the prompt that they share, or one a row.

A group has one prompt and n completions. Laid out as a tree the prompt goes through the model once instead of n
times: each completion sees the prompt and itself, at the positions it would have alone, and not its siblings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.types import Ints

# Families whose every layer is full attention with rotary positions, which tests/test_layout.py has compared.
TREE_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt_neox"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """b prompts with their completions in R rows of L tokens, padded on the right; completions to T tokens."""

    input_ids: Tensor  # (R, L)
    position_ids: Tensor  # (R, L)
    attention_mask: Tensor  # (R, L) of real tokens; with shared prompts (R, 1, L, L): may query i see key j
    rows: Tensor  # (b,) row of each sequence
    positions: Tensor  # (b, T) index in L of the state before each completion token
    last: Tensor  # (b,) index in L of the sequence's last token
    targets: Tensor  # (b, T) completion tokens
    mask: Tensor  # (b, T) true on completion tokens


def sequences(
    prompt_ids: Sequence[Ints],
    completion_ids: Sequence[Ints],
    device: torch.device | str,
    *,
    bundles: Sequence[int] | None = None,
    width: int | None = None,
) -> Sequences:
    """Put b prompts (P_i,) and completions (T_i,) into one batch.

    bundles: how many successive sequences lie in each row behind the prompt that they share; by default one each.
    width: sets T, by default the longest.
    """
    sizes = [1] * len(prompt_ids) if bundles is None else bundles
    edges = np.cumsum([0, *sizes])
    counts = [len(completion) for completion in completion_ids]
    length = max(len(prompt_ids[a]) + sum(counts[a:b]) for a, b in pairwise(edges))
    input_ids, position_ids = (np.zeros((len(sizes), length), np.int64) for _ in range(2))
    branch = np.full((len(sizes), length), -1)  # -1 padding, 0 prompt, then 1, 2, ... completions
    starts = np.zeros(len(counts), np.int64)
    targets = np.zeros((len(counts), max(counts) if width is None else width), np.int64)
    for row, (a, b) in enumerate(pairwise(edges)):
        prompt = prompt_ids[a]
        place = len(prompt)
        input_ids[row, :place], position_ids[row, :place], branch[row, :place] = prompt, np.arange(place), 0
        for i in range(a, b):
            span = slice(place, place + counts[i])
            input_ids[row, span], branch[row, span] = completion_ids[i], i - a + 1
            position_ids[row, span] = len(prompt) + np.arange(counts[i])
            starts[i], place = place, span.stop
            targets[i, : counts[i]] = completion_ids[i]
    ends = np.array([len(prompt) - 1 for prompt in prompt_ids])
    steps = np.arange(targets.shape[1])[None, :]
    mask = steps < np.array(counts)[:, None]
    before = np.where(steps == 0, ends[:, None], starts[:, None] + steps - 1)
    arrays = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": _visible(branch) if max(sizes) > 1 else (branch >= 0).astype(np.int64),
        "rows": np.repeat(np.arange(len(sizes)), sizes),
        "positions": np.where(mask, before, 0),
        "last": np.where(np.array(counts) > 0, starts + np.array(counts) - 1, ends),
        "targets": targets,
        "mask": mask,
    }
    return Sequences(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def tree_width(hf: Any) -> int | None:
    """Return the hidden size of a model whose completions may share their prompt's row, None of any other.

    Custom masks pass through transformers' sdpa attention only, and would override a sliding window.
    """
    config = hf.config.get_text_config()
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    sliding = getattr(config, "sliding_window", None) is not None
    if config.model_type in TREE_FAMILIES and full and not sliding and config._attn_implementation == "sdpa":
        return int(config.hidden_size)
    return None


def _visible(branch: np.ndarray[tuple[int, int], Any]) -> np.ndarray[Any, Any]:
    """Return (R, 1, L, L): a token sees the prompt and what came before in its own completion; padding only itself."""
    queries, keys = branch[:, :, None], branch[:, None, :]
    seen = np.tril((keys == 0) | (keys == queries)) & (keys >= 0)
    visible = seen | np.eye(branch.shape[1], dtype=bool)
    return np.asarray(visible[:, None])
