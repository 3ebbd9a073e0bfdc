"""Prompts, pairs and demonstrations: order, rendering, what is left out."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.rows import Row
from configs.schema import Data
from tests.tiny import tokenizer as tiny_tokenizer
from trainers.data import (
    PromptStream,
    conversation_ids,
    load_demonstrations,
    load_pairs,
    load_rows,
    margins_of,
    prompt_ids,
    rows_hash,
    with_system,
)
from trainers.types import Message

HH = Path(__file__).parents[2] / "shared/data/hh_harmless_base_test.jsonl.gz"


def rows(count: int) -> list[Row]:
    return [Row(messages=(Message(role="user", content="w " * (i + 1)),), fields={"number": i}) for i in range(count)]


def stream(count: int = 10, limit: int = 1000, seed: int = 3) -> PromptStream:
    return PromptStream(rows(count), tiny_tokenizer(), Data(path="x.jsonl", render="text"), limit, seed)


def write(path: Path, content: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def test_each_epoch_shows_every_row_once_in_an_order_of_its_own() -> None:
    prompts = list(islice(stream(), 30))
    epochs = [[p.row["number"] for p in prompts[i : i + 10]] for i in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p.position for p in prompts] == list(range(30))
    assert len({p.uid for p in prompts}) == 30


def test_a_position_is_the_same_prompt_whoever_asks_and_whenever() -> None:
    whole = [p.uid for p in islice(stream(), 25)]
    resumed = [p.uid for p in islice(stream().start_at(13), 12)]
    assert resumed == whole[13:]
    assert [p.uid for p in islice(stream(seed=4), 25)] != whole


def test_too_long_prompts_are_left_out_and_counted_and_refused_only_if_all_are() -> None:
    short = stream(limit=4)
    assert all(len(p.token_ids) <= 4 for p in islice(short, 20))
    assert short.too_long + len(short) == 10 and short.too_long > 0
    with pytest.raises(UserError, match=r"all 10 prompts are longer than 1 tokens \(shortest: \d+\)"):
        stream(limit=1)


def test_chat_rendering_ends_where_the_assistant_begins_and_carries_the_system_prompt() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    messages = with_system([Message(role="user", content="hi")], "be brief")
    ids = prompt_ids(tokenizer, messages, "chat")
    assert tokenizer.decode(ids) == "<s>system:be brief</s><s>user:hi</s><s>assistant:"
    assert with_system(messages, "other") == messages
    with pytest.raises(UserError, match="no chat template; set data.render=text"):
        prompt_ids(tiny_tokenizer(), messages, "chat")


def test_long_conversations_lose_their_beginning() -> None:
    tokenizer = tiny_tokenizer()
    messages = [Message(role="user", content="abcdef")]
    assert tokenizer.decode(conversation_ids(tokenizer, messages, "XYZ")) == "abcdefXYZ"
    assert tokenizer.decode(conversation_ids(tokenizer, messages, "XYZ", 5)) == "efXYZ"


def test_pairs_and_demonstrations_are_rendered_as_they_are_scored_and_sampled(tmp_path: Path) -> None:
    content: list[dict[str, object]] = [
        {"prompt": "hi", "chosen": "good", "rejected": "bad"},
        {"prompt": "long " * 50, "chosen": "a", "rejected": "b"},
    ]
    data = Data(path=write(tmp_path / "pairs.jsonl", content), format="pairs")
    tokenizer = tiny_tokenizer(chat=True)
    pairs = load_pairs(data, tokenizer, 100)
    assert pairs.too_long == 1
    assert tokenizer.decode(pairs.items[0].rejected) == "<s>user:hi</s><s>assistant:bad</s>"
    demonstrations = load_demonstrations(data, tokenizer, 100)
    [example] = demonstrations.items
    assert tokenizer.decode(example.completion) == "good</s>"
    whole = np.concatenate([example.prompt, example.completion])
    np.testing.assert_array_equal(whole, pairs.items[0].chosen)
    with pytest.raises(UserError, match="all 2 examples are longer than 3 tokens"):
        load_pairs(data, tokenizer, 3)


def test_rows_without_a_margin_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    content: list[dict[str, object]] = [
        {"prompt": f"q{i}", "chosen": "a", "rejected": "b", "margin": i} for i in range(5)
    ]
    del content[2]["margin"]
    content[4]["margin"] = None
    partly = Data(path=write(tmp_path / "partly.jsonl", content), format="pairs")
    names = {"prompt": "q", "chosen": "c", "rejected": "r", "margin": "m"}
    (tmp_path / "empty.csv").write_text("q,c,r,m\none,a,b,2\ntwo,a,b,\n")
    empty = Data(path=str(tmp_path / "empty.csv"), format="columns", columns=names)
    for data, says in ((partly, r"2 of 5 rows .* first is .*partly\.jsonl:3; fill"), (empty, r"1 of 2 .*csv:3; fill")):
        pairs = load_pairs(data, tiny_tokenizer(), 100).items
        with pytest.raises(UserError, match=says):
            margins_of(pairs, data)
        known = [pair for pair in pairs if pair.margin is not None]
        assert margins_of(known, data) == [pair.margin for pair in known]


def test_a_conversation_without_an_answer_is_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    data = Data(path=write(tmp_path / "c.jsonl", [{"prompt": turns}, {"prompt": turns[:1]}]), format="messages")
    with pytest.raises(UserError, match=r"c\.jsonl:2: the row holds no completion: its last turn is not"):
        load_demonstrations(data, tiny_tokenizer(chat=True), 100)
    columns = data.model_copy(update={"format": "columns", "columns": {"prompt": "prompt"}})
    with pytest.raises(UserError, match=r"c\.jsonl: data\.columns: completions are read from chosen, or"):
        load_demonstrations(columns, tiny_tokenizer(chat=True), 100)


def test_splits_are_disjoint_by_prompt_and_cover_their_shares(tmp_path: Path) -> None:
    content: list[dict[str, object]] = [{"prompt": f"question {i % 300}"} for i in range(600)]
    path = write(tmp_path / "prompts.jsonl", content)
    shares = {"a": 0.5, "b": 0.5}
    parts = [load_rows(Data(path=path, splits=shares, split=name)) for name in shares]
    prompts = [{row.messages[0]["content"] for row in part} for part in parts]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 300
    assert 100 < len(prompts[0]) < 200
    assert sum(map(len, parts)) == 600


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    content: list[dict[str, object]] = [{"prompt": "a"}, {"prompt": "b"}]
    one = load_rows(Data(path=write(tmp_path / "one.jsonl", content)))
    two = load_rows(Data(path=write(tmp_path / "two.jsonl", content)))
    assert rows_hash(one) == rows_hash(two) != rows_hash(one[::-1])


@pytest.mark.skipif(not HH.exists(), reason="hh_harmless_base_test.jsonl.gz is not beside the repository")
def test_hh_rows_become_pairs_that_differ_in_the_last_turn_only() -> None:
    parsed = load_rows(Data(path=str(HH), format="hh"))
    assert len(parsed) > 2000
    for row in parsed:
        assert row.messages[-1]["role"] == "user" and row.chosen and row.rejected
        assert "Human:" not in row.messages[-1]["content"]
