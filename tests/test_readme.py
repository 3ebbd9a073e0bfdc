"""What the README types can be typed: its commands, recipes, overrides and code exist and parse; nothing is run."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.__main__ import main, parse
from configs.errors import UserError
from configs.load import load
from configs.schema import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every `headroom` and `make` command, in blocks and inside sentences."""
    prose = re.sub("<[^>\n]*>", "PLACEHOLDER", FENCED.sub("", text))
    blocks = re.findall(r"(?:^ {4}.*\n)+", prose, re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    for line in [*lines, *INLINE.findall(re.sub(r"^ {4}.*$", "", prose, flags=re.M))]:
        if typed := re.match(r"(?: {4})?(?:\$ )?(?:\S*/)?((?:headroom|make) [^-:>#]?[^>]*)", line):
            yield shlex.split(typed[1], comments=True)  # up to a redirection


COMMANDS = sorted({tuple(words) for words in commands(README)})


def test_the_commands_are_found() -> None:
    kinds = {words[:2] for words in COMMANDS}
    assert {("make", "demo"), ("make", "gpu"), ("headroom", "train"), ("headroom", "config")} <= kinds


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_parses(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        for word in words[1:]:
            variable, is_variable, _ = word.partition("=")
            assert re.search(rf"^{variable} \?=" if is_variable else rf"^{word}:", MAKEFILE, re.M), word
        return
    args = parse(words[1:])
    config = getattr(args, "config", None) or "configs/quickstart.yaml"
    if "loop.stalness=2" in words:  # the README shows what comes of it
        with pytest.raises(UserError):
            load(config, args.overrides)
    else:
        assert isinstance(load(config, args.overrides), Recipe)


def test_the_mistake_that_is_shown_is_answered_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    typed, answer = re.findall(r"^ {4}\$ headroom (.*)\n {4}(headroom: error: .*)$", README, re.M)[0]
    assert main(typed.split()) == 2
    assert capsys.readouterr().err == f"{answer}\n"


def blocks(language: str) -> list[str]:
    return [code for found, code in FENCED.findall(README) if found == language]


@pytest.mark.parametrize("block", blocks("yaml"))
def test_a_piece_of_recipe_in_the_readme_is_valid(block: str) -> None:
    tree: dict[str, Any] = {"run": {"name": "a"}, "model": {"path": "b"}, "data": {"path": "c"}}
    assert Recipe.model_validate(tree | yaml.safe_load(block)).run.name == "a"


@pytest.mark.parametrize("block", blocks("python"))
def test_a_piece_of_code_in_the_readme_parses(block: str) -> None:
    assert [node for node in ast.parse(block).body if isinstance(node, ast.FunctionDef)]


KEYS = sorted({key for key in INLINE.findall(README) if re.fullmatch(r"[a-z_]+\.[a-z_.]+=?", key)})


@pytest.mark.parametrize("key", [key for key in KEYS if key.split(".")[0] in Recipe.model_fields])
def test_a_key_that_the_readme_names_exists(key: str) -> None:
    section: Any = Recipe
    for part in key.removesuffix("=").split("."):
        assert part in section.model_fields, key
        section = section.model_fields[part].annotation
