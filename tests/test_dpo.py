"""DPO on real tiny models: what it learns, the reward model that it is then, and the command."""

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from actors.reward import RewardActor, build
from cluster import offline
from cluster.__main__ import main
from configs.errors import UserError
from configs.rows import Row, Turn
from configs.schema import Data, EvalScorer, Offline, Recipe, Reward, RewardComponent
from tests import ranks, tiny
from trainers.comparisons import choices, rankings
from trainers.models import load_policy
from trainers.objectives import Rows, dpo_objective
from trainers.offline import train_dpo
from trainers.scoring import ImplicitReward, Judged, RewardModel
from trainers.types import Group, Prompt, Rollout

DATA = Data(path="none", format="pairs", render="text")
BETA = 0.2


def preferences(count: int = 48) -> list[Row]:
    """The answer that begins with y is preferred to the one that begins with n."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefgh"))

    def word(longest: int) -> str:
        return "".join(rng.choice(letters, rng.integers(1, longest)))

    prompts = [f"{number}{word(9)}?" for number in range(count)]
    return [
        Row(messages=(Turn(role="user", content=text),), fields={}, chosen=f"y{word(6)}", rejected=f"n{word(6)}")
        for text in prompts
    ]


def tokens(rows: Sequence[Row]) -> Rows:
    found = choices(rows, DATA, tiny.tokenizer(), 64).items
    return [(choice.prompt_ids, choice.chosen, choice.rejected) for choice in found]


def alone(path: str | Path, prompt: np.ndarray, completion: np.ndarray) -> float:
    """Return the log-prob of one completion by HF's logits of this one text."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor(np.concatenate([prompt, completion]))[None].long()
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(completion)[:, None].long()).sum())


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.policy(tmp_path_factory.mktemp("start"), initializer_range=0.2)


@pytest.fixture(scope="module")
def trained(start: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Return a policy trained on `preferences` and its result."""
    output = tmp_path_factory.mktemp("dpo") / "policy"
    config = Offline.model_validate(
        {
            "output": str(output),
            "data": DATA,
            "beta": BETA,
            "epochs": 6,
            "batch": 8,
            "holdout": 0.25,
            "engine": {"token_budget": 300, "optimizer": {"learning_rate": 1e-2}},
        }
    )
    rows = preferences()
    train_dpo(config, start, tokens(rows), [row.messages[0]["content"] for row in rows], log=lambda line: None)
    return output, json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize("length_normalisation", [False, True])
def test_a_loss_is_that_of_each_pair_alone_whatever_the_batch(
    start: str, tmp_path: Path, tree: bool, loss: str, length_normalisation: bool
) -> None:
    """Against log-probs of HF, one text at a time; the reference is another model, so that no difference is 0."""
    rows = tokens(preferences(6))
    torch.manual_seed(1)
    other = tmp_path / "other"
    tiny.LlamaForCausalLM(tiny.llama(initializer_range=0.2)).save_pretrained(other)
    reference = torch.tensor([[alone(other, prompt, text) for text in pair] for prompt, *pair in rows])
    expected = []
    for (prompt, *pair), origins in zip(rows, reference.tolist(), strict=True):
        ratios = [alone(start, prompt, text) - origin for text, origin in zip(pair, origins, strict=True)]
        if length_normalisation:
            ratios = [ratio / len(text) for ratio, text in zip(ratios, pair, strict=True)]
        h = ratios[0] - ratios[1]
        soft = 0.9 * math.log1p(math.exp(-BETA * h)) + 0.1 * math.log1p(math.exp(BETA * h))
        expected.append(soft if loss == "dpo" else (h - 0.8 / (2 * BETA)) ** 2)
    objective = dpo_objective(
        rows, reference, tree=tree, loss=loss, beta=BETA, label_smoothing=0.1, length_normalisation=length_normalisation
    )
    model = load_policy(start, "float32").eval()
    for chosen in ([0], [4, 1], range(6), range(5, -1, -1)):
        with torch.no_grad():
            losses, _ = objective.losses(model, chosen)
        np.testing.assert_allclose(losses, [expected[i] for i in chosen], rtol=2e-4, atol=2e-5)


def test_it_starts_at_ln_2_and_learns_the_preference(trained: tuple[Path, dict[str, float]]) -> None:
    _, result = trained
    assert result["loss_before"] == pytest.approx(math.log(2), abs=1e-5), "the policy is its own reference then"
    assert result["loss"] < 0.5 * result["loss_before"] and result["accuracy"] >= 0.9
    assert result["accuracy_low"] < result["accuracy"] and result["holdout_rows"] >= 5


def judged(rows: Sequence[Row]) -> list[Judged]:
    texts = [(row.messages, text) for row in rows for text in (row.chosen, row.rejected)]
    return [Judged(messages=messages, completion=str(text)) for messages, text in texts]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_score_is_beta_times_the_log_ratio_of_the_text_alone(
    start: str, trained: tuple[Path, dict[str, float]], tmp_path: Path, padding_side: str
) -> None:
    policy = tmp_path / "policy"
    load_policy(trained[0], "float32").hf.save_pretrained(policy)
    tiny.tokenizer(padding_side=padding_side).save_pretrained(policy)
    rows = preferences(5)
    expected = [
        BETA * (alone(policy, prompt, text) - alone(start, prompt, text))
        for prompt, *pair in tokens(rows)
        for text in pair
    ]
    for budget in (1, 60, 10_000):
        for share_prompts in (True, False):
            model = ImplicitReward(
                str(policy), start, beta=BETA, token_budget=budget, share_prompts=share_prompts, device="cpu"
            )
            np.testing.assert_allclose(model.score(judged(rows)), expected, atol=2e-5)
    np.testing.assert_allclose(model.score(judged(rows)[::-1])[::-1], expected, atol=2e-5)


def test_beyond_the_longest_length_the_beginning_is_cut_off(start: str, trained: tuple[Path, dict[str, float]]) -> None:
    [row] = preferences(1)
    [(prompt, chosen, rejected)] = tokens([row])
    room = len(prompt) + len(chosen) - 2
    model = ImplicitReward(str(trained[0]), start, beta=1.0, max_length=room)
    expected = alone(trained[0], prompt[2:], chosen) - alone(start, prompt[2:], chosen)
    assert model.score(judged([row]))[0] == pytest.approx(expected, abs=1e-4)
    short = ImplicitReward(str(trained[0]), start, beta=1.0, max_length=3).score(judged([row]))[0]
    assert short == pytest.approx(
        alone(trained[0], prompt[-1:], chosen[:2]) - alone(start, prompt[-1:], chosen[:2]), abs=1e-4
    )


def test_a_dpo_policy_is_a_reward_model_that_ranks_its_training_pairs(
    start: str, trained: tuple[Path, dict[str, float]]
) -> None:
    component = RewardComponent(name="dpo", model=str(trained[0]), reference=start, beta=BETA, weight=2)
    actor = RewardActor(Reward(components=[component]))
    right = []
    for row, (prompt, *_) in zip(preferences(), tokens(preferences()), strict=True):
        rollouts = tuple(
            Rollout(
                uid=f"s{i}", seed=i, token_ids=np.zeros(1, np.int32), logprobs=np.zeros(1, np.float32), spans=(),
                finish_reason="stop", text=str(text),
            )
            for i, text in enumerate((row.chosen, row.rejected))
        )  # fmt: skip
        group = Group(prompt=Prompt(uid="p", position=0, messages=row.messages, token_ids=prompt), rollouts=rollouts)
        chosen, rejected = asyncio.run(actor.score(group))
        assert chosen["reward"] == pytest.approx(2 * chosen["rewards"]["dpo"])
        right.append(chosen["reward"] > rejected["reward"])
    assert np.mean(right) >= 0.95
    at_default = build(EvalScorer(name="dpo", model=str(trained[0]), reference=start), Reward())
    sample = [("s0", str(preferences(1)[0].chosen))]
    prompt = Prompt(uid="p", position=0, messages=preferences(1)[0].messages, token_ids=np.zeros(1, np.int32))
    [score] = asyncio.run(at_default.scores(prompt, sample))
    assert score == pytest.approx(judged_at(trained[0], start, 0.1), abs=1e-5)


def judged_at(path: Path, start: str, beta: float) -> float:
    return ImplicitReward(str(path), start, beta=beta).score(judged(preferences(1)))[0]


def test_a_reference_of_other_tokens_is_refused(start: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has other tokens; give its start weights"):
        ImplicitReward(start, ranks.tiny_policy(tmp_path), beta=BETA)


def test_rankings_are_read_as_they_are_ordered_and_a_pair_is_one_of_two() -> None:
    turns = (Turn(role="user", content="q"),)
    rows = [
        Row(messages=turns, fields={}, chosen="a", rejected="ccc", ranked=("a", "bb", "ccc")),
        Row(messages=turns, fields={}, chosen="a", rejected="b"),
        Row(messages=turns, fields={}, chosen="a", rejected="b" * 9),
    ]
    found = rankings(rows, DATA, tiny.tokenizer(), 5)
    assert [len(item.texts) for item in found.items] == [3, 2] and found.too_long == 1
    assert [tiny.tokenizer().decode(text) for text in found.items[0].texts] == ["qa", "qbb", "qccc"]
    prompt, chosen, rejected = tokens(rows[:1])[0]
    assert (prompt.tolist(), len(chosen), len(rejected)) == (found.items[0].texts[0][:1].tolist(), 2, 4)
    assert chosen[-1] == rejected[-1] == tiny.tokenizer().eos_token_id
    for read in (rankings, choices):
        with pytest.raises(UserError, match="the row holds no preference; correct or delete it"):
            read([Row(messages=turns, fields={}, chosen="a")], DATA, tiny.tokenizer(), 64)


def test_the_command_trains_what_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.policy(tmp_path / "policy")
    pairs = [{"prompt": f"is {a}?", "chosen": "yes", "rejected": "no"} for a in "abcdefghijklmnop"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    tree = {
        "run": {"name": "case"},
        "model": {"path": "policy", "dtype": "float32"},
        "data": {"path": "pairs.jsonl"},
        "tracking": {"uri": "sqlite:///tracked.db"},
        "dpo": {
            "output": "tuned",
            "data": {"path": "pairs.jsonl", "format": "pairs", "render": "text"},
            "batch": 4,
            "epochs": 4,
            "holdout": 0.3,
            "engine": {"zero": 0, "threads": 1, "optimizer": {"learning_rate": 1e-2}},
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    assert main(["dpo", "recipe.yaml", "dpo.loss=ipo"]) == 0
    result = json.loads((tmp_path / "tuned/result.json").read_text())
    assert result["kind"] == "dpo" and result["loss"] < 0.5 * result["loss_before"]
    assert result["loss_before"] == pytest.approx(25, abs=1e-2)  # (0 - 1 / (2 * 0.1))^2
    kept = tmp_path / "tuned.checkpoint/metrics.jsonl"  # by a machine too slow to reach the store in time
    assert (tmp_path / "tracked.db").exists() or kept.exists()


@pytest.mark.parametrize("loss", ["kwise", "margin"])
def test_rankings_and_margins_come_from_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """The columns' scores rank the answers; with margin the rows carry it."""
    tiny.policy(tmp_path / "policy")
    ranked = {"answers": ["no", "yes!", "so so"], "points": [1.0, 9.0, 5.0]}
    single = {"good": "yes!", "bad": "no", "points": 4}
    rows = [{"q": f"{a} {b}?", **(ranked if loss == "kwise" else single)} for a in "abcdef" for b in "stuvwx"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"completions": "answers", "scores": "points"}
    if loss == "margin":
        columns = {"chosen": "good", "rejected": "bad", "margin": "points"}
    tree = {
        "run": {"name": "case"},
        "model": {"path": "policy", "dtype": "float32"},
        "data": {"path": "rows.jsonl"},
        "tracking": {"uri": "sqlite:///tracked.db"},
        "reward_models": {
            "rm": {
                "output": "rm",
                "data": {"path": "rows.jsonl", "format": "columns", "columns": {"prompt": "q", **columns}},
                "loss": loss,
                "batch": 4,
                "epochs": 3,
                "holdout": 0.3,
                "engine": {"zero": 0, "threads": 1, "optimizer": {"learning_rate": 1e-2}},
            }
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    assert main(["reward", "recipe.yaml"]) == 0
    result = json.loads((tmp_path / "rm/result.json").read_text())
    assert result["accuracy"] == 1.0
    model = RewardModel("rm", device="cpu")
    asked = (Turn(role="user", content="z z?"),)
    scores = model.score([Judged(messages=asked, completion=text) for text in ("yes!", "so so", "no")])
    if loss == "kwise":
        assert scores == sorted(scores, reverse=True)
    else:
        assert result["loss_before"] > 3 and scores[0] - scores[2] > 3, "as far apart as the margin says, about"


class TrainingBeginsError(Exception):
    """Raised where rows would be trained on."""


@pytest.mark.parametrize("what", ["dpo", "pairs", "kwise"])
def test_all_rows_of_a_prompt_are_held_out_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Whatever their answers begin with: the split is by the prompt, which the commands hand on."""
    answers = [("yes, so", "no"), ("yes, so", "yes, not"), ("a", "b")]
    rows = [{"prompt": "a?", "chosen": one, "rejected": other} for one, other in answers]
    rows += [{"prompt": "b?", "chosen": "a", "rejected": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "rows.jsonl"), "format": "pairs", **({"render": "text"} if what == "dpo" else {})}
    section = {"output": str(tmp_path / "out"), "data": data}
    models = {} if what == "dpo" else {"rm": section | ({"loss": "kwise"} if what == "kwise" else {})}
    recipe = Recipe.model_validate(
        {
            "run": {"name": "case"},
            "model": {"path": tiny.policy(tmp_path / "policy")},
            "data": {"path": "none"},
            "reward_models": models,
            **({"dpo": section} if what == "dpo" else {}),
        }
    )
    keys: list[str] = []

    def take(_: Any, __: str, rows: Any, given: list[str], **___: Any) -> None:
        keys.extend(given)
        raise TrainingBeginsError

    monkeypatch.setattr(offline, "train_dpo" if what == "dpo" else "train_reward", take)
    with pytest.raises(TrainingBeginsError):
        _ = offline.dpo(recipe) if what == "dpo" else offline.reward(recipe, ["rm"])
    assert len(keys) == 4 and len(set(keys[:3])) == 1 and keys[3] != keys[0]


def test_margins_that_are_missing_from_some_rows_are_counted_before_anything_is_trained(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "margin": 1.0} for i in range(6)]
    for number in (3, 5):
        del rows[number]["margin"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "rows.jsonl"), "format": "pairs"}
    recipe = Recipe.model_validate(
        {
            "run": {"name": "case"},
            "model": {"path": tiny.policy(tmp_path / "policy")},
            "data": {"path": "none"},
            "reward_models": {"rm": {"output": str(tmp_path / "rm"), "data": data, "loss": "margin"}},
        }
    )
    with pytest.raises(UserError, match=r"2 of 6 rows have no margin, the first is .*rows\.jsonl:4; fill them in"):
        offline.reward(recipe, ["rm"])
    assert not list(tmp_path.glob("rm*"))
