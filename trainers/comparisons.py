"""From rows with preferences to what K-wise reward models and DPO are trained on; plain pairs are in trainers.data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.rows import Row, prompt_text
from configs.schema import Data
from trainers.data import Examples, completion_ids, conversation_ids, fitting, prompt_ids, unusable, with_system
from trainers.types import Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Completions of one prompt in order, each in its conversation, as tokens of a reward model."""

    uid: str
    prompt: str  # decides what is held out
    texts: tuple[Ints, ...]  # K of (T_k,), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A preference between two completions, as tokens of the policy."""

    uid: str
    prompt: str  # decides what is held out
    prompt_ids: Ints  # (P,)
    chosen: Ints  # (C,) with the token that ends it
    rejected: Ints  # (R,) with the token that ends it


def rankings(rows: Sequence[Row], data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples[Ranking]:
    """Tokenise rankings the way RewardModel scores their texts; a pair is a ranking of two.

    One is left out if any of its texts is beyond `max_length` tokens. Raises UserError if a row has no preferences, or
    none is left.
    """
    items = []
    for number, row in enumerate(rows):
        messages = with_system(row.messages, data.system_prompt)
        texts = row.ranked or _pair(row, data)
        ids = tuple(np.array(conversation_ids(tokenizer, messages, text), np.int32) for text in texts)
        items.append(Ranking(uid=f"p{number}", prompt=prompt_text(row.messages), texts=ids))
    return fitting(items, [max(map(len, item.texts)) for item in items], max_length, rows, data)


def choices(rows: Sequence[Row], data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples[Choice]:
    """Tokenise preferences as the policy would generate them; what is beyond `max_length` tokens is left out.

    Raises UserError if a row has no preference, or none is left.
    """
    items = []
    for number, row in enumerate(rows):
        messages = with_system(row.messages, data.system_prompt)
        chosen, rejected = (completion_ids(tokenizer, messages, text, data.render) for text in _pair(row, data))
        items.append(
            Choice(
                uid=f"p{number}",
                prompt=prompt_text(row.messages),
                prompt_ids=prompt_ids(tokenizer, messages, data.render),
                chosen=chosen,
                rejected=rejected,
            )
        )
    lengths = [len(item.prompt_ids) + max(len(item.chosen), len(item.rejected)) for item in items]
    return fitting(items, lengths, max_length, rows, data)


def _pair(row: Row, data: Data) -> tuple[str, str]:
    if row.chosen is None or row.rejected is None:
        raise unusable(row, data, preferences=True)
    return row.chosen, row.rejected
