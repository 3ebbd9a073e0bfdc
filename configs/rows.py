"""Rows of local data files, and what a row is once its format is understood (configs.formats)."""

import csv
import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO, TypedDict

from configs.errors import UserError

FILES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


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
    margin: float | None = None  # by how much chosen is better, in the dataset's unit, never negative
    ranked: tuple[str, ...] | None = None  # best first, no two equally good, chosen first and rejected last
    where: str = field(default="", compare=False)  # file and line, for errors


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


def kind(value: Any) -> str:
    """Say what a value of a row is, for an error: its type and its beginning."""
    return "nothing" if value is None else f"{type(value).__name__} {json.dumps(value, default=str)[:40]}"


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
            raise UserError(f"{path}:{line}: malformed row: a JSON object is needed, not {kind(row)}")
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
