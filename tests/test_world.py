"""The demo's world: its grammar, gold, annotators and tokenizer, and that nothing that learns can reach gold."""

import ast
import math
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from configs.load import load
from trainers import world
from trainers.gold import FLOOR, gold, topic_of

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "My new phone cannot find the wifi."
A, B, C, D = world.STEPS["network"]
OTHER = world.STEPS["refund"][0]
KIND, KINDER, KINDEST = world.COURTESIES[:3]


@pytest.mark.parametrize(
    ("sentences", "score"),
    [
        ([A, B, C, D], 1.0),
        ([D, KIND, B, C, A], 1.0),  # order is free, and so is one courtesy
        ([A, B], 0.5),
        ([], 0.0),
        ([KIND], 0.0),
        ([A, A], 0.25),  # one repetition is forgiven
        ([A, A, A], 0.25 - 0.03),
        ([A, A, KIND, KINDER], 0.25 - 0.03 * 4),
        ([KIND, KINDER, KINDEST], -0.03 * 4),
        ([A, OTHER], 0.25 - 0.1),
        ([OTHER, OTHER], -0.2),
        ([A, "Unplug the"], 0.25 - 0.1),  # cut off: no sentence
        (["Unplug router the."], -0.1),
        ([KIND] * 40, FLOOR),
    ],
)
def test_gold_of_answers_written_by_hand(sentences: list[str], score: float) -> None:
    assert gold(PROMPT, " ".join(sentences), {"topic": "network"}) == pytest.approx(score)


def test_gold_finds_the_topic_in_the_prompt_and_refuses_what_is_not_of_the_grammar() -> None:
    for row in world.prompts("rl", 200, 0):
        assert topic_of(row["prompt"]) == row["topic"]
        assert gold(row["prompt"], " ".join(world.STEPS[row["topic"]]), {}) == 1.0
    with pytest.raises(ValueError, match="no topic"):
        gold("Who are you?", A, {})


def test_everything_is_a_function_of_its_seed() -> None:
    assert world.prompts("rl", 50, 1) == world.prompts("rl", 50, 1) != world.prompts("rl", 50, 2)
    assert world.demonstrations(50, 1) == world.demonstrations(50, 1) != world.demonstrations(50, 2)
    assert world.tokenizer().backend_tokenizer.to_str() == world.tokenizer().backend_tokenizer.to_str()


def test_splits_are_disjoint_and_hold_different_prompts() -> None:
    drawn = [row["prompt"] for split in world.SPLITS for row in world.prompts(split, world.size(split), 0)]
    assert len(set(drawn)) == len(drawn) == 4 * 3 * len(world.ADJECTIVES) * len(world.ITEMS)
    demonstrated = {row["prompt"] for row in world.demonstrations(500, 0)}
    assert demonstrated <= {row["prompt"] for row in world.prompts("sft", world.size("sft"), 0)}
    with pytest.raises(ValueError, match="heldout"):
        world.prompts("heldout", world.size("heldout") + 1, 0)


def test_demonstrations_leave_room_for_improvement() -> None:
    rows = world.demonstrations(1000, 0)
    scores = [gold(row["prompt"], row["answer"], {}) for row in rows]
    assert 0.1 < sum(scores) / len(scores) < 0.4
    known = {*world.COURTESIES, *(step for steps in world.STEPS.values() for step in steps)}
    assert all(set(world.sentences(row["answer"])) <= known for row in rows)


def _longer_preferred(annotators: world.Annotators, golds: tuple[float, float] = (0.0, 0.0)) -> float:
    rng = random.Random(0)
    return sum(annotators.prefer_first((f"{A} {B} {KIND}", B), golds, rng) for _ in range(4000)) / 4000


def test_annotators_have_the_biases_stated_and_none_when_switched_off() -> None:
    # Equal gold, seven words more: P(longer preferred) = sigmoid(bias * 7 / 5 / noise).
    assert len(f"{A} {B} {KIND}".split()) - len(B.split()) == 7
    expected = 1 / (1 + math.e ** (-0.08 * 7 / 5 / 0.2))
    assert _longer_preferred(world.Annotators(length_bias=0.08, noise=0.2)) == pytest.approx(expected, abs=0.03)
    assert _longer_preferred(world.Annotators(length_bias=0.0, noise=0.2)) == pytest.approx(0.5, abs=0.03)
    polite = world.Annotators(length_bias=0.0, courtesy_bias=0.2, noise=0.2)
    assert _longer_preferred(polite) == pytest.approx(1 / (1 + math.e**-1), abs=0.03)
    exact = world.Annotators(length_bias=0.0, noise=0.0)
    assert _longer_preferred(exact, (0.1, 0.2)) == 0.0
    assert _longer_preferred(exact) == pytest.approx(0.5, abs=0.03)


def test_tokenizer_gives_a_token_a_word_and_survives_any_text(tmp_path: Path) -> None:
    world.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for row in world.demonstrations(300, 0):
        for text in (row["prompt"], row["answer"]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert len(ids) == len(text.split()) + sum(text.count(mark) for mark in ".?")
    strange = "Grüße, 世界! 🙂  two  spaces\n<tag> xyz"
    assert tokenizer.decode(tokenizer(strange, add_special_tokens=False)["input_ids"]) == strange
    assert tokenizer.unk_token is None
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_chat_template_ends_answers_and_opens_the_next() -> None:
    tokenizer = world.tokenizer()
    question = [{"role": "user", "content": PROMPT}]
    opened = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": A}], tokenize=False)
    assert opened == f"<|begin|><|user|>{PROMPT}<|assistant|>"
    assert whole == f"{opened}{A}<|end|>"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids[: len(tokenizer(opened, add_special_tokens=False)["input_ids"])] == tokenizer(opened)["input_ids"]


def test_policy_is_of_the_stated_size() -> None:
    config = world.policy_config(world.tokenizer())
    parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert 1e6 <= parameters <= 5e6
    assert config.head_dim in (32, 64, 96, 128)
    assert config.max_position_embeddings == 256


def _imports(module: str) -> set[str]:
    """Return the project's modules that `module` imports, wherever in the file."""
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        return set()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if (ROOT / (name.replace(".", "/") + ".py")).exists()}


def test_gold_is_imported_by_the_builder_alone_and_never_by_what_learns() -> None:
    modules = {
        f"{package}.{path.stem}"
        for package in ("configs", "trainers", "actors", "cluster")
        for path in (ROOT / package).glob("*.py")
    }
    assert {"trainers.offline", "trainers.world", "trainers.gold"} <= modules
    assert {module for module in modules if "trainers.gold" in _imports(module)} == {"trainers.world_build"}
    assert not {module for module in modules if "trainers.world_build" in _imports(module)}


def test_quickstart_trains_on_the_reward_model_and_evaluates_gold() -> None:
    recipe = load(ROOT / "configs" / "quickstart.yaml")
    assert [component.function for component in recipe.reward.components] == [None]
    scorers = {scorer.function for task in recipe.evaluation.tasks for scorer in task.scorers}
    assert "trainers.gold:gold" in scorers
    assert recipe.run.steps >= 20
    assert recipe.run.steps // recipe.evaluation.every + 1 >= 5
    used = (recipe.learner, recipe.reference, recipe.reward, recipe.generator, recipe.evaluation)
    assert sum(section.resources.cpus for section in used) <= 2
