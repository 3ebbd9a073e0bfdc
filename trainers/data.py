"""From dataset rows to prompts and preference pairs.

The order of prompts is a pure function of (seed, epoch, position): a resumed run needs one number, no loader state.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configs.errors import UserError
from configs.formats import FOLDERS, lacking, parse_rows, refusal
from configs.rows import Row, is_file, prompt_text, read_rows, split_of
from configs.schema import Data
from trainers.types import Ints, Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A preference: two conversations that share their prompt, as tokens of a reward model."""

    uid: str
    prompt: str  # decides what is held out: never both
    chosen: Ints  # (C,)
    rejected: Ints  # (R,)
    margin: float | None = None  # by how much the chosen one was found better
    where: str = ""  # file and line, for errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt and the completion to imitate, as tokens of the policy."""

    uid: str
    prompt: Ints  # (P,)
    completion: Ints  # (T,) with the token that ends it


Example = TypeVar("Example")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples(Generic[Example]):
    """The usable rows of a dataset split, and what was left out."""

    items: tuple[Example, ...]
    too_long: int
    rows_hash: str


class PromptStream:
    """The prompts of a run in admission order, endless, shuffled anew in every epoch.

    Rows whose prompt has more than `max_prompt_tokens` tokens are left out and counted in `too_long`.
    Raises UserError if that leaves none.
    """

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: Data, max_prompt_tokens: int, seed: int
    ) -> None:
        self.seed = seed
        self.rows_hash = rows_hash(rows)
        kept = []
        lengths = []
        for number, row in enumerate(rows):
            messages = with_system(row.messages, data.system_prompt)
            ids = prompt_ids(tokenizer, messages, data.render)
            lengths.append(len(ids))
            if len(ids) <= max_prompt_tokens:
                kept.append((number, messages, ids, row.fields))
        self._kept = tuple(kept)
        self.too_long = len(rows) - len(kept)
        if not kept:
            raise UserError(
                f"{data.path}: all {len(rows)} prompts are longer than {max_prompt_tokens} tokens "
                f"(shortest: {min(lengths, default=0)}); raise data.max_prompt_tokens or model.max_length"
            )

    def __len__(self) -> int:
        """Return the number of prompts in one epoch."""
        return len(self._kept)

    def __getitem__(self, position: int) -> Prompt:
        """Return the prompt at `position` (0, 1, … without end)."""
        epoch, place = divmod(position, len(self._kept))
        number, messages, ids, fields = self._kept[_order(self.seed, epoch, len(self._kept))[place]]
        return Prompt(uid=f"e{epoch}-p{number}", position=position, messages=messages, token_ids=ids, row=fields)

    def texts(self) -> Iterator[str]:
        """Return the prompts of one epoch as text, without a system prompt."""
        return (prompt_text(messages) for _, messages, _, _ in self._kept)

    def start_at(self, position: int) -> Iterator[Prompt]:
        """Iterate without end from `position`."""
        while True:
            yield self[position]
            position += 1

    def __iter__(self) -> Iterator[Prompt]:
        return self.start_at(0)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or public id. Raises UserError if there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"model {path}: no tokenizer can be loaded ({first}); give an HF directory or id") from error
    return tokenizer


def load_rows(data: Data) -> list[Row]:
    """Return the first `data.limit` parsed rows of `data.split`, in file order; what comes after them is not read.

    Raises UserError naming file and row.
    """
    if wrong := refusal(data):
        raise UserError(f"data.{wrong}")
    parsed = parse_rows(_raw_rows(data), data)
    if data.split is not None:
        parsed = (row for row in parsed if split_of(prompt_text(row.messages), data.splits) == data.split)
    rows = list(islice(parsed, data.limit))
    if not rows:
        where = f" in split {data.split!r}" if data.split else ""
        raise UserError(f"{data.path}: no rows{where}; check the data section")
    return rows


def load_pairs(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples[Pair]:
    """Tokenise preference pairs the way RewardModel scores them; pairs beyond `max_length` tokens are left out.

    Raises UserError if no pair is left.
    """
    rows = load_rows(data)
    pairs = []
    for number, row in enumerate(rows):
        if row.chosen is None or row.rejected is None:
            raise unusable(row, data, preferences=True)
        messages = with_system(row.messages, data.system_prompt)
        chosen, rejected = (conversation_ids(tokenizer, messages, text) for text in (row.chosen, row.rejected))
        pairs.append(
            Pair(
                uid=f"p{number}",
                prompt=prompt_text(row.messages),
                chosen=np.array(chosen, np.int32),
                rejected=np.array(rejected, np.int32),
                margin=row.margin,
                where=row.where,
            )
        )
    return fitting(pairs, [max(len(p.chosen), len(p.rejected)) for p in pairs], max_length, rows, data)


def margins_of(pairs: Sequence[Pair], data: Data) -> list[float]:
    """Return the margin of each pair, for loss margin. Raises UserError if some have none."""
    without = [pair.where for pair in pairs if pair.margin is None]
    if without:
        raise UserError(
            f"{data.path}: {len(without)} of {len(pairs)} rows have no margin, the first is {without[0]}; "
            "fill them in, or take loss=bradley_terry"
        )
    return [pair.margin for pair in pairs if pair.margin is not None]


def load_demonstrations(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples[Demonstration]:
    """Tokenise what `headroom sft` imitates: the row's chosen or only completion.

    Raises UserError if the rows have no completions, or none fits into `max_length` tokens.
    """
    rows = load_rows(data)
    items = []
    for number, row in enumerate(rows):
        if row.chosen is None:
            raise unusable(row, data, preferences=False)
        messages = with_system(row.messages, data.system_prompt)
        prompt = prompt_ids(tokenizer, messages, data.render)
        completion = completion_ids(tokenizer, messages, row.chosen, data.render)
        items.append(Demonstration(uid=f"p{number}", prompt=prompt, completion=completion))
    return fitting(items, [len(i.prompt) + len(i.completion) for i in items], max_length, rows, data)


def unusable(row: Row, data: Data, *, preferences: bool) -> UserError:
    """Return the error for a row without a preference, or a completion: is the section to be mended, or the row?"""
    if wrong := lacking(data, preferences=preferences):
        return UserError(f"{data.path}: data.{wrong}")
    what = "preference" if preferences else "completion: its last turn is not the assistant's"
    return UserError(f"{row.where or data.path}: the row holds no {what}; correct or delete it")


def with_system(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """Put `system_prompt`, if there is one, before the conversation; an own system turn stays."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return tuple(messages)
    return (Message(role="system", content=system_prompt), *messages)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], render: str) -> Ints:
    """Return what the policy is given, (P,): the chat template up to the assistant's turn, or the plain text.

    Raises UserError if a chat is asked for and the tokenizer has no template.
    """
    if render == "text":
        return np.array(tokenizer(prompt_text(messages))["input_ids"], np.int32)
    if tokenizer.chat_template is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: it has no chat template; set data.render=text or use a chat model"
        )
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], completion: str, render: str
) -> Ints:
    """Return what a policy is to generate after `prompt_ids`, (T,), with the token that ends it.

    Raises UserError if a chat is asked for and the template renders an answered prompt differently.
    """
    if render == "text":
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    else:
        ids = _answer_ids(tokenizer, messages, completion)
    return np.array(ids, np.int32)


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], completion: str, max_length: int | None = None
) -> list[int]:
    """Return a whole conversation as tokens: the chat template, or prompt + completion where there is none.

    Beyond `max_length` tokens the beginning is cut off, since the score is about the end.
    """
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer(prompt_text(messages) + completion)["input_ids"]
    else:
        turns = [*messages, Message(role="assistant", content=completion)]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if max_length is None else ids[-max_length:]


def rows_hash(rows: Sequence[Row]) -> str:
    """Return the sha256 over the content of rows, hex: equal data, equal hash, wherever it lay."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.messages, row.chosen, row.rejected, row.fields]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _answer_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str) -> list[int]:
    """Tokenise the assistant's turn alone, up to the end-of-turn token: generation stops there."""
    before: str = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    turns = [*messages, Message(role="assistant", content=answer)]
    whole: str = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(before):
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: its chat template renders a prompt differently once it is answered; "
            "use data.render=text or another tokenizer"
        )
    ids: list[int] = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def fitting(
    items: Sequence[Example], lengths: Sequence[int], max_length: int, rows: Sequence[Row], data: Data
) -> Examples[Example]:
    """Leave out the items longer than `max_length` tokens. Raises UserError if that leaves none."""
    kept = tuple(item for item, length in zip(items, lengths, strict=True) if length <= max_length)
    if not kept:
        raise UserError(
            f"{data.path}: all {len(items)} examples are longer than {max_length} tokens (shortest: {min(lengths)}); "
            "raise max_length"
        )
    return Examples(items=kept, too_long=len(items) - len(kept), rows_hash=rows_hash(rows))


def _raw_rows(data: Data) -> Iterator[tuple[str, dict[str, Any]]]:
    if is_file(data.path):
        yield from read_rows(data.path)
        return
    from datasets import load_dataset  # noqa: PLC0415  # heavy, and not needed for files

    try:
        part = {"data_dir": data.name} if data.format in FOLDERS else {"name": data.name}
        rows = load_dataset(data.path, split=data.source_split, streaming=data.streaming, **part)
        for number, row in enumerate(rows, 1):
            yield f"{data.path} row {number}", dict(row)
    except Exception as error:  # datasets raises many kinds for one fact: it cannot be had
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.path: cannot load {data.path!r} ({first}); check the id and the network, or give a local file"
        ) from error


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
