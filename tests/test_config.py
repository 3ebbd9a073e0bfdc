"""Recipes: loading, overrides, origins, the data rows they describe, and the ones that are shipped."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import reference
from configs.errors import UserError
from configs.formats import parse_row
from configs.hardware import fast_dtype
from configs.load import load, load_with_origins, render
from configs.rows import Row, prompt_text, read_rows, split_of
from configs.schema import Data, Recipe
from configs.seats import seats

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
RECIPE = """
run: {name: a}
model:
  path: org/model
data: {path: org/data}
learner: {optimizer: {learning_rate: 1e-5}, resources: &half {cpus: 0.5}}
generator:
  resources: *half
  engine: {sizes: [1, {deep: "x: y # z"}], note: "two\\nlines"}
reward:
  components:
    - {name: a, function: "m:f"}
    - {name: b, model: org/rm, weight: -1}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_parses(shipped: Path) -> None:
    load(shipped)


def test_the_configuration_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference.markdown(), "run: python -m configs.reference > docs/configuration.md"


def test_overrides_reach_lists_sections_and_new_keys(path: Path) -> None:
    overrides = [
        "reward.components.0.weight=2",
        "generator.engine.extra.flag=true",
        "sft={output: o, data: {path: p}}",
        "sft.epochs=3",
        "generator.resources.cpus=2",
        "learner.optimizer.learning_rate=3e-4",
    ]
    recipe = load(path, overrides)
    assert [component.weight for component in recipe.reward.components] == [2, -1]
    assert recipe.generator.engine["extra"] == {"flag": True} and recipe.generator.engine["sizes"] == [
        1,
        {"deep": "x: y # z"},
    ]
    assert recipe.sft is not None and recipe.sft.epochs == 3
    assert (recipe.generator.resources.cpus, recipe.learner.resources.cpus) == (2, 0.5)  # an alias is not shared
    assert recipe.learner.optimizer.learning_rate == 3e-4


def test_a_word_for_the_algorithm_is_its_name_and_keeps_what_else_the_recipe_says(path: Path) -> None:
    recipe = load(path, ["algorithm.kl.coefficient=0.3", "algorithm=rloo"])
    assert (recipe.algorithm.name, recipe.algorithm.kl.where, recipe.algorithm.kl.coefficient) == (
        "rloo",
        "reward",
        0.3,
    )
    with pytest.raises(UserError, match="algorithm.kl"):
        load(path, ["algorithm={kl: 1}"])


def test_the_rendered_recipe_is_the_recipe(path: Path) -> None:
    loaded = load_with_origins(path, ["loop.staleness=4", "sampling.stop=['#', \"a\\nb\", 'c: d', null_]"])
    text = render(loaded)
    assert Recipe.model_validate(yaml.safe_load(text)) == loaded.recipe
    origins = dict(line.rsplit("  # ", 1) for line in text.splitlines() if "  # " in line)
    by_line = {line.strip(): origin for line, origin in origins.items()}
    assert by_line["staleness: 4"] == "command line"
    assert by_line["- name: b"] == f"{path}:13" and by_line["path: org/model"] == f"{path}:4"
    assert by_line["seed: 0"] == "default"


def test_seats_follow_the_algorithm_and_the_counts(path: Path) -> None:
    def roles(*overrides: str) -> Counter[str]:
        return Counter(seat.name.rpartition("-")[0] for seat in seats(load(path, overrides)))

    assert roles() == {"learner": 1, "generator": 1, "reward": 1, "reference": 1}
    ppo = roles("algorithm.name=ppo", "critic.ranks=2", "generator.replicas=3", "algorithm.kl.where=none")
    assert ppo == {"learner": 1, "critic": 2, "generator": 3, "reward": 1}


ROWS = [{"prompt": 'a, "b"\nc', "id": "1"}, {"prompt": "ü", "id": "2"}]


def test_rows_are_the_same_in_every_file_format(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text("\ufeff\n" + lines, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "id"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name, numbers in {"a.jsonl": [2, 3], "a.jsonl.gz": [1, 2], "a.csv": [3, 4], "a.parquet": [1, 2]}.items():
        found = list(read_rows(str(tmp_path / name)))
        assert [where for where, _ in found] == [f"{tmp_path / name}:{number}" for number in numbers]
        assert [row for _, row in found] == ROWS


def parsed(row: dict[str, Any], **data: Any) -> Row | None:
    return parse_row(row, Data(path="x", **data), "x:1")


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_each_format_gives_prompt_and_completions() -> None:
    def seen(row: Row | None) -> Any:
        return row and (list(row.messages), row.chosen, row.rejected)

    assert seen(parsed({"q": "a"}, column="q")) == (turns("a"), None, None)
    chat = {"format": "messages", "column": "m"}
    assert seen(parsed({"m": turns("a", "b", "c")}, **chat)) == (turns("a", "b", "c"), None, None)
    assert seen(parsed({"m": turns("a", "b")}, **chat)) == (turns("a"), "b", None)
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert seen(parsed(pair, format="pairs")) == (turns("p"), "c", "r")
    assert seen(parsed(pair | {"prompt": turns("a", "b", "c")}, format="pairs")) == (turns("a", "b", "c"), "c", "r")

    def hh(chosen: str, rejected: str) -> Any:
        return seen(parsed({"chosen": chosen, "rejected": rejected}, format="hh"))

    start = "\n\nHuman: a\n\nlist: 1\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert hh(f"{start} yes", f"{start} no\n\nmore") == (turns("a\n\nlist: 1", "b", "c"), "yes", "no\n\nmore")
    assert hh(f"{start} yes", "\n\nHuman: other\n\nAssistant: no") is None, "no common prompt"
    assert hh(f"{start} yes", start) is None, "an empty answer"
    assert hh("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "\n\nHuman: a\n\nHuman: b\n\nAssistant: d") is None
    assert hh("no transcript", "no transcript") is None


def test_a_missing_column_names_those_found() -> None:
    with pytest.raises(UserError, match=r"x:1: no column 'prompt'; found question, answer"):
        parsed({"question": "a", "answer": "b"})


@settings(max_examples=50, deadline=None)
@given(st.text(), st.dictionaries(st.sampled_from("abc"), st.floats(0, 1 / 3), max_size=3))
def test_a_prompt_is_in_one_split_and_stays_there_when_later_ones_change(prompt: str, splits: dict[str, float]) -> None:
    name = split_of(prompt, splits)
    assert name is None or splits[name] > 0
    if name is not None:
        assert split_of(prompt, splits | {"later": 1 - sum(splits.values())}) == name
    assert split_of(prompt, {"whole": 1.0}) == "whole"


def test_splits_have_their_shares() -> None:
    drawn = Counter(split_of(f"prompt {i}", {"a": 0.6, "b": 0.3}) for i in range(10_000))
    for name, share in {"a": 0.6, "b": 0.3, None: 0.1}.items():
        assert abs(drawn[name] / 10_000 - share) < 4 * (share * (1 - share) / 10_000) ** 0.5  # 4 standard errors


def test_prompt_text_is_plain_for_one_turn_and_labelled_for_several() -> None:
    row = parsed({"m": [{"role": "system", "content": "s"}, *turns("a")]}, format="messages", column="m")
    assert row is not None and prompt_text(row.messages) == "a"
    row = parsed({"m": turns("a", "b", "c")}, format="messages", column="m")
    assert row is not None and prompt_text(row.messages) == "User: a\n\nAssistant: b\n\nUser: c"


@pytest.mark.parametrize(
    ("flags", "expected"), [("fma avx2", "float32"), ("avx512f avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16")]
)
def test_auto_takes_bfloat16_only_where_the_cpu_has_instructions_for_it(
    flags: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: amx_bf16 in a name does not count\nflags\t\t: fpu {flags}\n")
    assert fast_dtype(cpuinfo) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert fast_dtype(cpuinfo) == "bfloat16"


def test_auto_is_settled_when_the_recipe_is_read(path: Path) -> None:
    assert load(path, ["model.dtype=auto"]).model.dtype == fast_dtype()
