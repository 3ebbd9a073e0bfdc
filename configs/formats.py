"""What becomes of a raw row: a pure function for each published format, and one for columns of any names.

Fields, signs and what is left out: docs/data.md. A row whose columns or types are wrong raises UserError naming it; a
row that is well formed but of no use (a tie, an empty answer, no common prompt) is None.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from configs.errors import UserError
from configs.rows import Row, Turn, is_file, kind
from configs.schema import Data

PREFERENCES: tuple[str, ...] = (
    "pairs",
    "hh",
    "columns",
    "ultrafeedback",
    "ultrafeedback_binarized",
    "helpsteer2",
    "helpsteer2_preference",
)
COMPLETIONS: tuple[str, ...] = (*PREFERENCES, "messages", "gsm8k", "math")
FOLDERS = ("hh", "helpsteer2_preference")  # their parts on the hub are folders, not configurations
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def refusal(data: Data) -> str | None:
    """Return what is wrong with a data section in itself, the key first; None if nothing is."""
    given = data.columns
    if data.column != Data.model_fields["column"].default and data.format not in ("prompt", "messages"):
        hint = "name it in columns" if data.format == "columns" else "leave it out"
        return f"column: format {data.format!r} does not read it, prompt and messages do; {hint}"
    if data.streaming and data.limit is None:
        return "limit: streaming takes the first rows of a dataset; say how many with limit"
    if data.streaming and is_file(data.path):
        return "streaming: a file is read as a stream in any case; leave streaming out"
    if given and data.format != "columns":
        return f"columns: format {data.format!r} has columns of its own; set format=columns or leave columns out"
    if data.format == "columns" and "prompt" not in given:
        return "columns: format columns needs the prompt's column at least; set columns={prompt: NAME, chosen: NAME}"
    if ("completions" in given) != ("scores" in given):
        return "columns: completions and scores are lists of one length and go together; name both"
    if "completions" in given and not given.keys() <= {"prompt", "completions", "scores"}:
        return "columns: chosen, rejected and margin follow from completions and scores; name one or the other"
    if "chosen" not in given and given.keys() & {"rejected", "margin"}:
        return "columns: rejected and margin are of use beside chosen only; name its column too"
    return None


def lacking(data: Data, *, preferences: bool) -> str | None:
    """Return why rows of `data` have no completions, or no preferences, the key first; None if they should have."""
    known, what = (PREFERENCES, "preference pairs") if preferences else (COMPLETIONS, "completions")
    if data.format not in known:
        return f"format: {data.format!r} rows hold no {what}; use one of {', '.join(known)}"
    wanted = ("chosen", "rejected") if preferences else ("chosen",)
    if data.format != "columns" or "completions" in data.columns or data.columns.keys() >= set(wanted):
        return None
    return f"columns: {what} are read from {' and '.join(wanted)}, or completions and scores; name their columns too"


def parse_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], data: Data) -> Iterator[Row]:
    """Yield what `data` sees in raw (where, row), in order and without reading ahead; raises as `parse_row` does."""
    parsed = (replace(row, where=where) for where, raw in rows if (row := parse_row(raw, data, where)) is not None)
    return paired(parsed) if data.format == "helpsteer2" else parsed


def parse_row(row: Mapping[str, Any], data: Data, where: str) -> Row | None:
    """Return what `data` sees in one raw row; None if it is of no use.

    Raises UserError naming `where`, and the columns found if one that is needed is missing.
    """
    match data.format:
        case "prompt":
            return Row(messages=_user(_text(row, data.column, where)), fields=row)
        case "messages":
            return _conversation(_turns(row, data.column, where), row)
        case "pairs":
            return mapped(row, {name: name for name in ("prompt", "chosen", "rejected", "margin")}, where)
        case "columns":
            return mapped(row, dict(data.columns.items()), where)
        case "hh":
            return hh(row, where)
        case "ultrafeedback":
            return ultrafeedback(row, where)
        case "ultrafeedback_binarized":
            return ultrafeedback_binarized(row, where)
        case "helpsteer2":
            return helpsteer2(row, where)
        case "helpsteer2_preference":
            return helpsteer2_preference(row, where)
        case "gsm8k":
            return gsm8k(row, where)
        case "math":
            return competition_math(row, where)


def mapped(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row | None:
    """Columns of any names: `columns` says where prompt, chosen, rejected and margin are, or completions and scores.

    A prompt is text or chat turns; a completion is text, or chat turns that end with it.
    """
    column = columns["prompt"]
    is_chat = isinstance(_column(row, column, where), list)
    messages = _turns(row, column, where) if is_chat else _user(_text(row, column, where))
    if "completions" in columns:
        return _ranked(messages, _scored(row, columns["completions"], columns["scores"], where), row)
    chosen, rejected = (
        _answer(row, columns[name], where) if name in columns else None for name in ("chosen", "rejected")
    )
    margin = _margin(row, columns["margin"], where) if "margin" in columns else None
    if chosen is not None and chosen == rejected:
        return None
    return Row(messages=messages, chosen=chosen, rejected=rejected, margin=margin, fields=row)


def hh(row: Mapping[str, Any], where: str) -> Row | None:
    """Anthropic/hh-rlhf: two transcripts that share everything up to the last assistant's turn."""
    prompt, answer = _cut(_text(row, "chosen", where))
    other_prompt, other = _cut(_text(row, "rejected", where))
    _, *parts = _HH_TURN.split(prompt)
    turns = _alternating(zip(parts[::2], (said.strip() for said in parts[1::2]), strict=True))
    if prompt != other_prompt or turns is None or answer == other or not (answer and other):
        return None
    return Row(messages=turns, chosen=answer, rejected=other, fields=row)


def ultrafeedback(row: Mapping[str, Any], where: str) -> Row | None:
    """openbmb/UltraFeedback: about four completions, ranked by fine-grained_score; best against worst.

    Not by overall_score: 2,628 of the first release are 10 where 1 was meant.
    """
    completions = _column(row, "completions", where)
    if not isinstance(completions, list) or not all(
        isinstance(one, dict) and isinstance(one.get("response"), str) for one in completions
    ):
        raise UserError(f"{where}: malformed row: 'completions' must be a list of objects, each with a text 'response'")
    scored = [(_fine_grained(one), one["response"]) for one in completions]
    return _ranked(_user(_text(row, "instruction", where)), [(s, text) for s, text in scored if s is not None], row)


def ultrafeedback_binarized(row: Mapping[str, Any], where: str) -> Row | None:
    """HuggingFaceH4/ultrafeedback_binarized: chosen and rejected as chat turns; margin is the difference of scores."""
    chosen, rejected = (_turns(row, name, where) for name in ("chosen", "rejected"))
    margin = _number(row, "score_chosen", where) - _number(row, "score_rejected", where)
    answers = chosen[-1]["content"], rejected[-1]["content"]
    usable = len(chosen) > 1 and chosen[-1]["role"] == rejected[-1]["role"] == "assistant"
    if (
        margin <= 0
        or answers[0] == answers[1]
        or chosen[:-1] != rejected[:-1]
        or not usable
        or not all(map(str.strip, answers))
    ):
        return None
    return Row(messages=chosen[:-1], chosen=answers[0], rejected=answers[1], margin=margin, fields=row)


def helpsteer2(row: Mapping[str, Any], where: str) -> Row | None:
    """nvidia/HelpSteer2: one response with its ratings; `paired` makes preferences of those that share a prompt."""
    turns, response = _helpsteer_prompt(row, where), _string(row, "response", where)
    _number(row, "helpfulness", where)
    return Row(messages=turns, chosen=response, fields=row) if turns and response.strip() else None


def paired(rated: Iterable[Row]) -> Iterator[Row]:
    """Yield a preference by helpfulness for consecutive HelpSteer2 rows of one prompt; ties are left out."""
    for messages, group in groupby(rated, key=lambda row: row.messages):
        rows = list(group)
        scored = [(float(row.fields["helpfulness"]), row.chosen or "") for row in rows]
        fields = {"prompt": rows[0].fields["prompt"], "rated": [row.fields for row in rows]}
        if preference := _ranked(messages, scored, fields):
            yield replace(preference, where=rows[0].where)


def helpsteer2_preference(row: Mapping[str, Any], where: str) -> Row | None:
    """nvidia/HelpSteer2, folder preference: strength < 0 prefers response_1, > 0 response_2, 0 neither."""
    first, second = (_string(row, name, where) for name in ("response_1", "response_2"))
    strength, turns = _number(row, "preference_strength", where), _helpsteer_prompt(row, where)
    if strength == 0 or first == second or turns is None or not (first.strip() and second.strip()):
        return None
    chosen, rejected = (first, second) if strength < 0 else (second, first)
    return Row(messages=turns, chosen=chosen, rejected=rejected, margin=abs(strength), fields=row)


def gsm8k(row: Mapping[str, Any], where: str) -> Row:
    """openai/gsm8k: question and worked answer, which ends with #### and the result; calculator notes are taken out."""
    question, answer = _text(row, "question", where), _text(row, "answer", where)
    if "####" not in answer:
        raise UserError(f"{where}: malformed row: 'answer' must end with #### and the result; is it GSM8K's?")
    return Row(messages=_user(question), chosen=_CALCULATOR.sub("", answer), fields=row)


def competition_math(row: Mapping[str, Any], where: str) -> Row:
    r"""MATH (Hendrycks et al. 2021): problem and solution, in which \boxed{} (or \fbox{}) holds the result."""
    problem, solution = _text(row, "problem", where), _text(row, "solution", where)
    if "\\boxed" not in solution and "\\fbox" not in solution:
        raise UserError(f"{where}: malformed row: 'solution' must hold the result in \\boxed{{}}; is it MATH's?")
    return Row(messages=_user(problem), chosen=solution, fields=row)


def _ranked(messages: tuple[Turn, ...], scored: Iterable[tuple[float, str]], row: Mapping[str, Any]) -> Row | None:
    """Put the best against the worst; of equally good completions the first stays; empty and repeated ones go."""
    texts: dict[float, str] = {}
    for score, text in sorted(scored, key=lambda pair: -pair[0]):
        if text.strip() and text not in texts.values():
            texts.setdefault(score, text)
    if len(texts) < 2:
        return None
    scores, ranked = list(texts), tuple(texts.values())
    margin = scores[0] - scores[-1]
    return Row(messages=messages, chosen=ranked[0], rejected=ranked[-1], margin=margin, ranked=ranked, fields=row)


def _fine_grained(completion: Mapping[str, Any]) -> float | None:
    """Return fine-grained_score, or where it is missing what it is: the mean of the ratings that are numbers."""
    if (given := _finite(completion.get("fine-grained_score"))) is not None:
        return given
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    ratings = [_finite(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def _helpsteer_prompt(row: Mapping[str, Any], where: str) -> tuple[Turn, ...] | None:
    first, *rest = _HELPSTEER_TURN.split(_text(row, "prompt", where))
    return _alternating([("User", first), *zip(rest[::2], rest[1::2], strict=True)])


def _alternating(said: Iterable[tuple[str, str]]) -> tuple[Turn, ...] | None:
    """Return chat turns; None unless user and assistant alternate, the user first and last, none of them empty.

    Chat templates want that; the datasets have a few rows without.
    """
    turns = tuple(Turn(role=_ROLES[speaker], content=text) for speaker, text in said)
    alternate = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
    return turns if alternate and len(turns) % 2 == 1 and all(turn["content"].strip() for turn in turns) else None


def _conversation(turns: tuple[Turn, ...], row: Mapping[str, Any]) -> Row | None:
    if turns[-1]["role"] != "assistant":
        return Row(messages=turns, fields=row)
    return Row(messages=turns[:-1], chosen=turns[-1]["content"], fields=row) if turns[1:] else None


def _user(text: str) -> tuple[Turn, ...]:
    return (Turn(role="user", content=text),)


def _cut(transcript: str) -> tuple[str, str]:
    prompt, _, answer = transcript.rpartition("\n\nAssistant:")
    return prompt, answer.strip()


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r}; found {', '.join(map(str, row)) or 'none'}; "
            "set data.format, data.column or data.columns"
        )
    return row[column]


def _string(row: Mapping[str, Any], column: str, where: str) -> str:
    value = _column(row, column, where)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: malformed row: {column!r} must be text, not {kind(value)}; correct the row or data.format"
        )
    return value


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = _string(row, column, where)
    if not value.strip():
        raise UserError(
            f"{where}: malformed row: {column!r} must be text, not an empty string; correct the row or data.format"
        )
    return value


def _answer(row: Mapping[str, Any], column: str, where: str) -> str:
    if not isinstance(_column(row, column, where), list):
        return _text(row, column, where)
    last = _turns(row, column, where)[-1]
    if last["role"] != "assistant" or not last["content"].strip():
        raise UserError(f"{where}: malformed row: the turns of {column!r} must end with the assistant's answer")
    return last["content"]


def _turns(row: Mapping[str, Any], column: str, where: str) -> tuple[Turn, ...]:
    value = _column(row, column, where)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: malformed row: {column!r} must be a list of chat turns, not {kind(value)}")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: malformed row: each turn of {column!r} needs the texts 'role' and 'content'")
    return tuple(Turn(role=turn["role"], content=turn["content"]) for turn in value)


def _scored(row: Mapping[str, Any], completions: str, scores: str, where: str) -> Sequence[tuple[float, str]]:
    texts, numbers = _column(row, completions, where), _column(row, scores, where)
    known = [_finite(number) for number in numbers] if isinstance(numbers, list) else []
    if not isinstance(texts, list) or len(texts) != len(known) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where}: malformed row: {completions!r} and {scores!r} must be a list of texts and one of as many numbers"
        )
    return [(score, text) for score, text in zip(known, texts, strict=True) if score is not None]


def _number(row: Mapping[str, Any], column: str, where: str) -> float:
    value = _column(row, column, where)
    if (number := _finite(value)) is None:
        raise UserError(f"{where}: malformed row: {column!r} must be a number, not {kind(value)}; correct the row")
    return number


def _margin(row: Mapping[str, Any], column: str, where: str) -> float | None:
    """Return by how much chosen is better; None where the row does not say: an empty cell, or no such column."""
    if row.get(column) in (None, ""):
        return None
    margin = _number(row, column, where)
    if margin < 0:
        raise UserError(f"{where}: malformed row: {column!r} must not be negative: chosen is the better one")
    return margin


def _finite(value: Any) -> float | None:
    """Return a number, or text that is one (CSV, UltraFeedback's ratings); None for anything else, "N/A" included."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
