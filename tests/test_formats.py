"""Every published format on rows written in it: what becomes of them, which sign means what, what is left out."""

import json
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest

from configs.errors import UserError
from configs.formats import COMPLETIONS, PREFERENCES, parse_row, parse_rows, refusal
from configs.rows import Row, prompt_text, split_of
from configs.schema import Data
from trainers.data import load_rows


def parsed(row: dict[str, Any], **data: Any) -> Row | None:
    return parse_row(row, Data(path="x", **data), "x:1")


def of(row: dict[str, Any], **data: Any) -> Row:
    found = parsed(row, **data)
    assert found is not None
    return found


def turns(*contents: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents))


def chat(*contents: str) -> list[dict[str, str]]:
    return list(turns(*contents))


def completion(response: str, score: float | None, *ratings: str, overall: float = 10.0) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "annotations": {
            aspect: {"Rating": rating, "Rationale": "because"} for aspect, rating in zip(aspects, ratings, strict=False)
        },
        "critique": "Fine.",
        "custom_system_prompt": "Be helpful.",
        "fine-grained_score": score,
        "model": "gpt-4",
        "overall_score": overall,
        "principle": "helpfulness",
        "response": response,
    }


def ultra(*completions: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": "sharegpt",
        "instruction": "Name a colour.",
        "models": ["gpt-4"] * len(completions),
        "completions": list(completions),
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def test_ultrafeedback_is_ranked_by_the_fine_grained_score_not_the_overall_one() -> None:
    row = ultra(
        completion("worst", 1.0, overall=10.0),  # as the first release had it
        completion("best", 4.75, overall=8.5),
        completion("middle", 3.5, overall=7.0),
        completion("low", 2.0, overall=9.0),
    )
    found = of(row, format="ultrafeedback")
    assert found.messages == turns("Name a colour.")
    assert (found.chosen, found.rejected, found.margin) == ("best", "worst", 3.75)
    assert found.ranked == ("best", "middle", "low", "worst")
    assert found.fields is row


def test_ultrafeedback_falls_back_on_the_mean_of_the_ratings_that_are_numbers() -> None:
    row = ultra(
        completion("a", None, "5", "N/A", "4", "3"),  # 4
        completion("b", float("nan"), "4", "4", "5", "5"),  # 4.5
        completion("c", None, "N/A", "N/A"),  # not known: left out
        completion("  ", 5.0),  # empty: left out
    )
    found = of(row, format="ultrafeedback")
    assert found.ranked == ("b", "a") and found.margin == 0.5


def test_completions_with_equal_scores_are_not_ranked_against_each_other() -> None:
    row = ultra(completion("a", 3.0), completion("b", 5.0), completion("c", 5.0), completion("d", 3.0))
    assert of(row, format="ultrafeedback").ranked == ("b", "a")
    assert parsed(ultra(completion("a", 4.0), completion("b", 4.0)), format="ultrafeedback") is None
    assert parsed(ultra(completion("a", 4.0)), format="ultrafeedback") is None
    assert parsed(ultra(), format="ultrafeedback") is None


def binarized(chosen: list[dict[str, str]], rejected: list[dict[str, str]], *scores: float) -> dict[str, Any]:
    return {
        "prompt": "Name a colour.",
        "prompt_id": "8c0f",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


def test_ultrafeedback_binarized() -> None:
    def seen(*args: Any) -> Row | None:
        return parsed(binarized(*args), format="ultrafeedback_binarized")

    found = seen(chat("Name a colour.", "Red."), chat("Name a colour.", "Dog."), 8.5, 3.0)
    assert found is not None and found.messages == turns("Name a colour.")
    assert (found.chosen, found.rejected, found.margin, found.ranked) == ("Red.", "Dog.", 5.5, None)
    assert seen(chat("Name a colour.", "Red."), chat("Name a colour.", "Blue."), 8.0, 8.0) is None, "a tie"
    assert seen(chat("Name a colour.", "Red."), chat("Name a colour.", ""), 8.0, 1.0) is None, "an empty answer"
    assert seen(chat("Name a colour.", "Red."), chat("Name an animal.", "Dog."), 8.0, 1.0) is None, "two prompts"
    assert seen(chat("Name a colour."), chat("Name a colour."), 8.0, 1.0) is None, "no answer"


def rated(prompt: str, response: str, helpfulness: int, **others: int) -> dict[str, Any]:
    rest = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1} | others
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **rest}


def rows_of(raw: list[dict[str, Any]], **data: Any) -> list[Row]:
    return list(parse_rows(((f"x:{i}", row) for i, row in enumerate(raw, 1)), Data(path="x", **data)))


def test_helpsteer2_pairs_consecutive_rows_of_a_prompt_by_helpfulness() -> None:
    multi = "Hi\n<extra_id_1>Assistant\nHello.\nHow are you?\n<extra_id_1>User\nFine"
    raw = [
        rated("c#", "A language.", 3),
        rated("c#", "A note in music.", 1, correctness=0),
        rated("tie", "one", 2, verbosity=0),
        rated("tie", "two", 2, verbosity=4),
        rated(multi, "Bad.", 0),
        rated(multi, "Good.", 4),
        rated("alone", "one", 4),
    ]
    first, second = rows_of(raw, format="helpsteer2")
    assert first.messages == turns("c#")
    assert (first.chosen, first.rejected, first.margin) == ("A language.", "A note in music.", 2.0)
    assert first.fields == {"prompt": "c#", "rated": raw[:2]}
    assert second.messages == turns("Hi", "Hello.\nHow are you?", "Fine")
    assert (second.chosen, second.rejected, second.margin) == ("Good.", "Bad.", 4.0)


def test_helpsteer2_preference_below_zero_prefers_the_first_response() -> None:
    def seen(strength: int, **changes: Any) -> Row | None:
        row = {
            "split": "train",
            "prompt": "Define signal",
            "response_1": "one",
            "response_2": "two",
            "preference_strength": strength,
            "preference_statement": "@Response 2 is better than @Response 1.",
            "preference_elaboration": "It is complete.",
            "three_most_similar_preferences": [{"statement": "…", "elaboration": "…", "strength": strength}],
            "all_preferences_unprocessed": [{"strength": strength, "justification": "…"}],
        }
        return parsed(row | changes, format="helpsteer2_preference")

    first, second = seen(-3), seen(1)
    assert first is not None and (first.chosen, first.rejected, first.margin) == ("one", "two", 3.0)
    assert second is not None and (second.chosen, second.rejected, second.margin) == ("two", "one", 1.0)
    assert second.fields["split"] == "train"
    assert seen(0) is None
    assert seen(2, response_1=" ") is None
    assert seen(2, prompt="Hi\n<extra_id_1>Assistant\nHello.") is None, "ends with the assistant's turn"


def test_gsm8k_keeps_the_marked_result_and_drops_the_calculator() -> None:
    row = {"question": "How many?", "answer": "She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 13"}
    found = of(row, format="gsm8k")
    assert found.messages == turns("How many?") and found.chosen == "She has 16 - 3 = 13 eggs.\n#### 13"
    assert found.rejected is None and found.fields is row
    with pytest.raises(UserError, match=r"x:1: malformed row: 'answer' must end with ####"):
        parsed({"question": "How many?", "answer": "13"}, format="gsm8k")


def test_math_needs_a_boxed_result() -> None:
    row = {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."}
    found = of(row, format="math")
    assert (found.messages, found.chosen, found.fields) == (turns("What is $1+1$?"), r"It is $\boxed{2}$.", row)
    assert of(row | {"solution": r"$\fbox{2}$"}, format="math").chosen
    with pytest.raises(UserError, match="'solution' must hold the result"):
        parsed(row | {"solution": "It is 2."}, format="math")


def test_columns_of_any_names() -> None:
    names = {"prompt": "question", "chosen": "best", "rejected": "worst", "margin": "gap"}
    row = {"question": "q", "best": "b", "worst": "w", "gap": "0.5", "id": 7}
    found = of(row, format="columns", columns=names)
    assert (found.messages, found.chosen, found.rejected, found.margin) == (turns("q"), "b", "w", 0.5)
    assert found.fields["id"] == 7
    as_chat = {"question": chat("a", "b", "c"), "best": chat("a", "b", "c", "good"), "worst": "bad", "gap": 0}
    found = of(as_chat, format="columns", columns=names)
    assert (found.messages, found.chosen, found.rejected, found.margin) == (turns("a", "b", "c"), "good", "bad", 0.0)
    only = of({"question": "q", "best": "b"}, format="columns", columns={"prompt": "question", "chosen": "best"})
    assert (only.chosen, only.rejected, only.margin) == ("b", None, None)


def test_columns_of_scored_completions() -> None:
    data = {"format": "columns", "columns": {"prompt": "q", "completions": "texts", "scores": "stars"}}
    found = of({"q": "p", "texts": ["a", "b", "c"], "stars": [1, "5", 3]}, **data)
    assert (found.chosen, found.rejected, found.margin, found.ranked) == ("b", "a", 4.0, ("b", "c", "a"))
    assert parsed({"q": "p", "texts": ["a", "b"], "stars": [2, 2]}, **data) is None
    with pytest.raises(UserError, match="'texts' and 'stars' must be a list of texts and one of as many numbers"):
        parsed({"q": "p", "texts": ["a", "b"], "stars": [2]}, **data)


def test_two_completions_with_one_text_are_a_tie() -> None:
    names = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    steered = {"prompt": "p", "response_1": "a", "response_2": "a", "preference_strength": 2}
    transcript = "\n\nHuman: p\n\nAssistant: a"
    assert parsed({"prompt": "p", "chosen": "a", "rejected": "a", "margin": 1}, format="pairs") is None
    assert parsed({"q": "p", "best": "a", "worst": chat("p", "a")}, format="columns", columns=names) is None
    assert parsed({"chosen": transcript, "rejected": transcript}, format="hh") is None
    assert parsed(binarized(chat("p", "a"), chat("p", "a"), 8.0, 3.0), format="ultrafeedback_binarized") is None
    assert parsed(steered, format="helpsteer2_preference") is None
    assert rows_of([rated("p", "a", 4), rated("p", "a", 1)], format="helpsteer2") == []
    ranking = ultra(completion("a", 5.0), completion("b", 3.0), completion("a", 1.0))
    assert of(ranking, format="ultrafeedback").ranked == ("a", "b")
    assert of({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0}, format="pairs").margin == 0.0


def test_pairs_may_carry_a_margin() -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert of(row, format="pairs").margin is None
    assert of(row | {"margin": "2"}, format="pairs").margin == 2.0
    with pytest.raises(UserError, match="'margin' must not be negative"):
        parsed(row | {"margin": -1}, format="pairs")


@pytest.mark.parametrize(
    ("format", "row", "says"),
    [
        ("ultrafeedback", {"instruction": "i"}, "no column 'completions'; found instruction"),
        ("ultrafeedback", {"instruction": "i", "completions": ["text"]}, "'completions' must be a list of objects"),
        ("ultrafeedback_binarized", {"chosen": "text"}, "'chosen' must be a list of chat turns, not str"),
        ("helpsteer2", rated("p", "r", 3) | {"helpfulness": None}, "'helpfulness' must be a number, not nothing"),
        ("helpsteer2", {"prompt": "p", "response": 3}, "'response' must be text, not int 3"),
        ("helpsteer2_preference", {"prompt": "p", "response_1": "a"}, "no column 'response_2'"),
        ("gsm8k", {"prompt": "p"}, "no column 'question'; found prompt"),
        ("math", {"problem": " "}, "'problem' must be text, not an empty string"),
        ("pairs", {"prompt": "p", "chosen": chat("p"), "rejected": "r"}, "must end with the assistant's answer"),
        ("pairs", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "much"}, "'margin' must be a number"),
    ],
)
def test_a_row_of_another_format_names_the_column(format: str, row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"x:1: .*{says}") as error:
        parsed(row, format=format)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"streaming": True}, "limit: streaming"),
        ({"columns": {"prompt": "q"}}, "columns: format 'prompt' has columns of its own"),
        ({"format": "columns"}, "columns: format columns needs"),
        ({"format": "columns", "columns": {"chosen": "c"}}, "columns: format columns needs"),
        ({"format": "columns", "columns": {"prompt": "q", "scores": "s"}}, "completions and scores"),
        (
            {"format": "columns", "columns": {"prompt": "q", "scores": "s", "completions": "c", "margin": "m"}},
            "columns: chosen, rejected and margin follow",
        ),
        ({"format": "columns", "columns": {"prompt": "q", "rejected": "r"}}, "columns: rejected and margin"),
        ({"format": "pairs", "column": "q"}, "column: format 'pairs' does not read it"),
        ({"format": "columns", "column": "q", "columns": {"prompt": "q"}}, "messages do; name it in columns"),
    ],
)
def test_a_data_section_that_cannot_work_is_refused(data: dict[str, Any], says: str) -> None:
    assert says in (refusal(Data(path="x", **data)) or "")
    with pytest.raises(UserError, match="^data\\."):
        load_rows(Data(path="x.jsonl", **data))


def test_streaming_is_for_public_datasets() -> None:
    assert refusal(Data(path="some/dataset", streaming=True, limit=3)) is None
    with pytest.raises(UserError, match=r"^data\.streaming: .*; leave streaming out$"):
        load_rows(Data(path="x.jsonl", streaming=True, limit=3))


def test_every_format_is_of_a_kind() -> None:
    formats = get_args(Data.model_fields["format"].annotation)
    assert set(formats) - set(COMPLETIONS) == {"prompt"}
    assert set(COMPLETIONS) - set(PREFERENCES) == {"messages", "gsm8k", "math"}


def test_splits_are_by_prompt_also_where_two_rows_share_one() -> None:
    raw = [rated(f"prompt {i}", f"answer {j}", j) for i in range(40) for j in (0, 4)]
    shares = {"train": 0.5, "held": 0.5}
    rows = rows_of(raw, format="helpsteer2")
    places = {prompt_text(row.messages): split_of(prompt_text(row.messages), shares) for row in rows}
    assert len(rows) == len(places) == 40 and set(places.values()) == {"train", "held"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_nested_rows_are_the_same_from_jsonl_and_parquet(tmp_path: Path) -> None:
    raw = [ultra(completion(f"a{i}", 2.0, "2"), completion(f"b{i}", 4.0, "4")) for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raw), tmp_path / "u.parquet")
    paths = (write(tmp_path / "u.jsonl", raw), tmp_path / "u.parquet")
    one, two = (load_rows(Data(path=str(path), format="ultrafeedback")) for path in paths)
    assert [(row.chosen, row.rejected, row.margin) for row in one] == [(f"b{i}", f"a{i}", 2.0) for i in range(3)]
    assert one == two


def test_what_comes_after_the_limit_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"p{i}"} for i in range(3)])
    path.write_text(path.read_text() + "broken")
    assert len(load_rows(Data(path=str(path), limit=3))) == 3
    with pytest.raises(UserError, match="rows.jsonl:4: malformed row"):
        load_rows(Data(path=str(path)))


def test_a_dataset_is_streamed_as_it_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(20)])
    write(folder / "test.jsonl", [{"question": "t", "answer": "#### 1"}])
    whole = load_rows(Data(path=str(folder), format="gsm8k"))
    streamed = load_rows(Data(path=str(folder), format="gsm8k", streaming=True, limit=5))
    assert len(whole) == 20 and streamed == whole[:5]
    held = load_rows(Data(path=str(folder), format="gsm8k", streaming=True, limit=5, source_split="test"))
    assert [prompt_text(row.messages) for row in held] == ["t"]
    shares = {"a": 0.5, "b": 0.5}
    parts = [
        load_rows(Data(path=str(folder), format="gsm8k", splits=shares, split=name, streaming=True, limit=20))
        for name in shares
    ]
    assert sum(map(len, parts)) == 20 and all(parts)


def test_a_part_that_is_a_folder_is_read_from_there(tmp_path: Path) -> None:
    (tmp_path / "set" / "preference").mkdir(parents=True)
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -1}
    write(tmp_path / "set" / "preference" / "preference.jsonl", [row])
    found = load_rows(Data(path=str(tmp_path / "set"), name="preference", format="helpsteer2_preference"))
    assert [row.chosen for row in found] == ["a"]


def test_a_dataset_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="data.path: cannot load") as error:
        load_rows(Data(path=str(tmp_path / "empty"), streaming=True, limit=1))
    assert "\n" not in str(error.value)
