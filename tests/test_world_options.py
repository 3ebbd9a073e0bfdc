"""What a recipe may change of the demo's world, for its controls: another option is another world."""

import json
from pathlib import Path

import pytest

from configs.errors import UserError
from tests.test_world_build import quickstart
from trainers.world import size
from trainers.world_build import MANIFEST, PAIRS, asked, is_prepared, skeleton, world_hash


def test_another_option_or_seed_is_another_world(tmp_path: Path) -> None:
    plain = quickstart(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"hash": world_hash(plain)}))
    defaults = ("run.prepare_options.pairs=2000", "run.prepare_options.length_bias=0.08", "run.seed=7")
    for same in (plain, *(quickstart(tmp_path, override) for override in defaults)):
        assert is_prepared(same)
    others = ("run.prepare_options.pairs=20000", "run.prepare_options.length_bias=0", "reward_models.helpdesk.seed=1")
    for other in (quickstart(tmp_path, override) for override in others):
        assert not is_prepared(other)


@pytest.mark.parametrize("given", ["pear=3", "pairs=0", "length_bias=long"])
def test_an_option_that_there_is_not_is_told_before_anything_is_written(tmp_path: Path, given: str) -> None:
    with pytest.raises(UserError, match=rf"^run.prepare_options.{given.split('=')[0]}: .* pairs, length_bias$"):
        skeleton(quickstart(tmp_path / "world", f"run.prepare_options.{given}"))
    assert not (tmp_path / "world").exists()


def test_ten_times_the_pairs_are_ten_times_as_many_of_each_prompt() -> None:
    (prompts, few), (same, many) = asked(PAIRS), asked(10 * PAIRS)
    assert prompts == same == size("pairs") and many == 10 * few
    assert all(count * each > number for number in (1, 100, PAIRS, PAIRS + 1) for count, each in [asked(number)])
