"""n-gram overlap of evaluation and training prompts: against a slow oracle, and what a run says of it."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Data, EvalScorer, EvalTask
from tests.tiny import tokenizer
from trainers.data import PromptStream, load_rows
from trainers.overlap import Overlap, check_overlap, overlaps

TRAINING = ["One two three four five six seven eight nine ten.", "short prompt", "a b c d e f g h i j"]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def slow(training: Sequence[str], prompt: str, n: int) -> tuple[bool, bool]:
    """Mark every word of every window that some training prompt also has, by looking everywhere."""
    mine = words(prompt)
    size = min(n, len(mine))
    marked = [False] * len(mine)
    for start in range(len(mine) - size + 1):
        window = mine[start : start + size]
        for other in map(words, training):
            if size == n:
                same = any(other[i : i + n] == window for i in range(len(other)))
            else:
                same = other == window
            if same and window:
                marked[start : start + size] = [True] * size
    return any(marked), 2 * sum(marked) > len(mine)


def one(training: Sequence[str], prompt: str, n: int = 8) -> Overlap:
    return overlaps(training, {"t": [prompt]}, n)["t"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(alphabet="ab ,", max_size=14), max_size=4),
    st.lists(st.text(alphabet="ab ,", max_size=14), max_size=4),
    st.integers(1, 4),
)
def test_it_finds_what_looking_everywhere_finds(training: list[str], prompts: list[str], n: int) -> None:
    found = overlaps(iter(training), {"t": prompts}, n)["t"]
    expected = [slow(training, prompt, n) for prompt in prompts]
    assert found.found == tuple(i for i, (some, _) in enumerate(expected) if some)
    assert found.covered == tuple(i for i, (_, most) in enumerate(expected) if most)
    assert found.prompts == len(prompts)


def test_eight_words_in_a_row_whatever_their_case_and_punctuation() -> None:
    assert one(TRAINING, "ONE, two; three - four (five) six: seven eight!").covered == (0,)
    assert not one(TRAINING, "one two three four five six seven").found, "seven words are no 8-gram, nor a whole prompt"
    assert not one(TRAINING, "one two three four x five six seven eight nine").found


def test_a_shorter_prompt_counts_only_as_a_whole() -> None:
    assert one(TRAINING, "Short prompt?").covered == (0,)
    assert not one(TRAINING, "a b c").found
    assert not one(TRAINING, "").found and not one([""], "").found and one(TRAINING, "").share == 0


def test_covered_means_more_than_half_of_the_words() -> None:
    shared = "a b c d e f g h"
    half = one(TRAINING, f"{shared} 1 2 3 4 5 6 7 8")
    assert (half.found, half.covered) == ((0,), ())
    more = one(TRAINING, f"{shared} 1 2 3 4 5 6 7")
    assert (more.found, more.covered) == ((0,), (0,))
    both = one(TRAINING, f"{shared} 1 2 3 4 5 6 7 8 one two three four five six seven eight nine ten")
    assert both.covered == (0,), "18 of 26 words, of two training prompts"


def test_tasks_are_told_apart() -> None:
    found = overlaps(TRAINING, {"dirty": ["new", TRAINING[2], "short prompt"], "clean": ["something else"]})
    assert (found["dirty"].found, found["dirty"].share) == ((1, 2), pytest.approx(2 / 3))
    assert (found["clean"].found, found["clean"].share) == ((), 0)


def task(path: Path, name: str, prompts: Sequence[str]) -> EvalTask:
    file = path / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    scorers = [EvalScorer(name="length", function="actors.rules:length")]
    return EvalTask(name=name, data=Data(path=str(file)), scorers=scorers)


def test_a_planted_prompt_is_told_in_a_line_and_nothing_else_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planted = task(tmp_path, "planted", ["fresh and new", "a b c d e f g h" + " and so on" * 50, TRAINING[0]])
    clean = task(tmp_path, "clean", ["nothing of the kind"])
    with caplog.at_level(logging.INFO, logger="headroom"):
        found = check_overlap([planted, clean], iter(TRAINING))
    assert {name: overlap.share for name, overlap in found.items()} == {"planted": pytest.approx(2 / 3), "clean": 0}
    [line] = caplog.messages
    assert "evaluation task planted: 2 of 3 prompts (66.7 %) share 8 words in a row with training prompts, 1 of" in line
    assert line.endswith(f"one: {TRAINING[0]!r}"), "the example is one that is covered"


def test_a_run_without_evaluations_goes_through_no_prompts() -> None:
    def never() -> Sequence[str]:
        raise AssertionError

    assert check_overlap([], (text for text in iter(never, None))) == {}


def test_the_training_prompts_are_those_of_the_stream_without_the_system_prompt(tmp_path: Path) -> None:
    path = task(tmp_path, "t", ["short", "too long " * 20]).data.path
    data = Data(path=path, render="text", system_prompt="Be brief.")
    assert list(PromptStream(load_rows(data), tokenizer(), data, 20, seed=0).texts()) == ["short"]
