"""Rows of local data files, read with the standard library, and what the data section makes of them."""

import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, TypedDict

from configs.errors import UserError
from configs.schema import Data

FILES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class Turn(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One dataset row: its prompt, the completions it carries, and all its columns."""

    messages: tuple[Turn, ...]  # ends before the assistant's answer
    fields: Mapping[str, Any]
    chosen: str | None = None  # the preferred completion, or the only one
    rejected: str | None = None


def is_file(path: str) -> bool:
    """Whether data.path names a file rather than a public dataset id."""
    return path.endswith(FILES)


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, row) of a data file; blank lines are skipped.

    Raises UserError naming file and line if a row cannot be read, or the file if it cannot be opened or has no rows.
    """
    if not is_file(path):
        raise UserError(f"{path}: not a data file; use one of {', '.join(FILES)}")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such data file; correct data.path")
    found = False
    for line, row in _numbered(path):
        found = True
        yield f"{path}:{line}", row
    if not found:
        raise UserError(f"{path}: the dataset is empty; give a file with at least one row")


def parse_row(row: Mapping[str, Any], data: Data, where: str) -> Row | None:
    """Return what `data` sees in a raw row; None if its transcripts share no usable prompt (format hh).

    Raises UserError naming `where`, and the columns found if one that is needed is missing.
    """
    match data.format:
        case "prompt":
            return Row(messages=_user(_text(row, data.column, where)), fields=row)
        case "messages":
            return _conversation(_turns(_column(row, data.column, where), data.column, where), row)
        case "pairs":
            prompt = _column(row, "prompt", where)
            messages = _user(prompt) if isinstance(prompt, str) else _turns(prompt, "prompt", where)
            chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
            return Row(messages=messages, chosen=chosen, rejected=rejected, fields=row)
        case "hh":
            return _hh(_text(row, "chosen", where), _text(row, "rejected", where), row)


def prompt_text(messages: Sequence[Turn]) -> str:
    """Return a prompt as one string: a single turn as it is, several as a labelled transcript."""
    turns = [turn for turn in messages if turn["role"] != "system"] or list(messages)
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def split_of(prompt: str, splits: Mapping[str, float]) -> str | None:
    """Return which of `splits` a prompt belongs to, None if their shares leave it out.

    A pure function of text and shares: equal prompts meet in one split, whatever file they come from.
    """
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    place = (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # in [0, 1): a float holds 53 bits
    for name, share in splits.items():
        place -= share
        if place < 0:
            return name
    return None


def _numbered(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.endswith(".parquet"):
        yield from _parquet(path)
        return
    opener = gzip.open if path.endswith(".gz") else open
    line = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            for line, row in _csv(path, file) if path.endswith(".csv") else _jsonl(path, file):
                yield line, row
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text somewhere after line {line}; convert the file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read after line {line} ({error}); fetch the file again") from None


def _jsonl(path: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path}:{line}: malformed row: {what}; correct or delete the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line}: malformed row: a JSON object is needed, not {_kind(row)}")
        yield line, row


def _csv(path: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]
        if twice:
            raise UserError(f"{path}:{reader.line_num}: the header names column {twice[0]} twice; rename one")
        for row in reader:
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or ())
                raise UserError(
                    f"{path}:{reader.line_num}: malformed row: the header names {wanted} columns and this row has "
                    f"{'more' if None in row else 'fewer'}; quote commas or correct the row"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: malformed row: {error}; correct the row") from None


def _parquet(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow  # noqa: PLC0415  # heavy; only this format needs it
    import pyarrow.parquet  # noqa: PLC0415

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read after row {line}: {str(error).splitlines()[0]}") from None


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r}; found {', '.join(map(str, row)) or 'none'}; set data.column or data.format"
        )
    return row[column]


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = _column(row, column, where)
    if not isinstance(value, str) or not value.strip():
        given = "an empty string" if isinstance(value, str) else _kind(value)
        raise UserError(f"{where}: malformed row: {column!r} must be text, not {given}; correct the row or data.format")
    return value


def _turns(value: Any, column: str, where: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: malformed row: {column!r} must be a list of chat turns, not {_kind(value)}")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: malformed row: each turn of {column!r} needs the texts 'role' and 'content'")
    return tuple(Turn(role=turn["role"], content=turn["content"]) for turn in value)


def _conversation(turns: tuple[Turn, ...], row: Mapping[str, Any]) -> Row | None:
    if turns[-1]["role"] != "assistant":
        return Row(messages=turns, fields=row)
    return Row(messages=turns[:-1], chosen=turns[-1]["content"], fields=row) if turns[1:] else None


def _user(text: str) -> tuple[Turn, ...]:
    return (Turn(role="user", content=text),)


def _hh(chosen: str, rejected: str, row: Mapping[str, Any]) -> Row | None:
    prompt, answer = _cut(chosen)
    other_prompt, other = _cut(rejected)
    _, *parts = _HH_TURN.split(prompt)
    turns = tuple(
        Turn(role=_HH_ROLES[speaker], content=said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    )
    alternate = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
    # Chat templates want alternating, non-empty turns; the dataset has a few rows without.
    usable = alternate and len(turns) % 2 == 1 and all(turn["content"] for turn in turns)
    if prompt != other_prompt or not usable or not (answer and other):
        return None
    return Row(messages=turns, chosen=answer, rejected=other, fields=row)


def _cut(transcript: str) -> tuple[str, str]:
    prompt, _, answer = transcript.rpartition("\n\nAssistant:")
    return prompt, answer.strip()


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {json.dumps(value, default=str)[:40]}"
