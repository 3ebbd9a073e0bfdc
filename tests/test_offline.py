"""SFT and reward models by the one `fit`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from configs.errors import UserError
from configs.schema import Offline
from tests.ranks import VOCABULARY, tiny_policy
from trainers.offline import Rows, train_reward, train_sft, wilson


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_policy(tmp_path_factory.mktemp("tiny"))


def offline(output: Path, **fields: object) -> Offline:
    engine = {"token_budget": 200, "optimizer": {"learning_rate": 1e-2, "schedule": "linear", "warmup_steps": 2}}
    return Offline.model_validate(
        {"output": str(output), "data": {"path": "none"}, "batch": 16, "holdout": 0.25, "engine": engine, **fields}
    )


def preferences(count: int) -> Rows:
    """The chosen text holds word 7 where the rejected one holds word 8."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt = rng.integers(10, VOCABULARY, rng.integers(2, 7))
        tails = [rng.integers(10, VOCABULARY, rng.integers(0, 5)) for _ in range(2)]
        rows.append(tuple(np.array([*prompt, w, *tail], np.int32) for w, tail in zip((7, 8), tails, strict=True)))
    return rows


def test_a_reward_model_learns_a_preference_and_is_trained_once(path: str, tmp_path: Path) -> None:
    rows = preferences(160)
    lines: list[str] = []
    config = offline(tmp_path / "reward", epochs=4)
    result = train_reward(config, path, rows, log=lines.append)
    assert result.accuracy is not None and result.accuracy >= 0.9 and result.loss < result.loss_before
    assert (result.accuracy_low, result.accuracy_high) == wilson(
        round(result.accuracy * result.holdout_rows), result.holdout_rows
    )
    assert result.rows + result.holdout_rows == 160 and result.holdout_rows > 20
    assert lines[-1].startswith(f"step {result.steps}/{result.steps}  loss ") and "0 s left" in lines[-1]
    assert json.loads((tmp_path / "reward/result.json").read_text())["accuracy"] == result.accuracy
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert model.config.num_labels == 1 and model.config.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "reward").pad_token == "w0"
    scores = [[float(model(torch.tensor(text)[None].long()).logits.detach()) for text in pair] for pair in rows]
    assert np.mean([chosen > rejected for chosen, rejected in scores]) >= 0.9

    assert train_reward(config, path, rows, log=lines.append) == result
    assert "trained already" in lines[-1]
    changed = train_reward(offline(tmp_path / "reward", epochs=1), path, rows)
    assert changed.config_hash != result.config_hash and changed.steps < result.steps


def test_sft_lowers_the_held_out_loss(path: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(96):  # count upwards from the prompt's last word
        start = int(rng.integers(5, 40))
        prompt = np.array([*rng.integers(5, 50, rng.integers(0, 4)), start], np.int32)
        rows.append((prompt, np.arange(start + 1, start + 2 + rng.integers(1, 8), dtype=np.int32)))
    result = train_sft(offline(tmp_path / "sft", epochs=8), path, rows, log=lambda line: None)
    assert result.accuracy is None and result.loss < 0.5 * result.loss_before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    nats, tokens = 0.0, 0
    for prompt, completion in rows:
        ids = torch.tensor(np.concatenate([prompt, completion]))[None].long()
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nats -= float(logprobs.gather(1, torch.tensor(completion)[:, None].long()).detach().sum())
        tokens += len(completion)
    assert nats / tokens < 0.5 * result.loss_before


def test_rows_of_one_key_stay_together(path: str, tmp_path: Path) -> None:
    rows, keys = preferences(40), [f"prompt {i % 8}" for i in range(40)]
    result = train_reward(offline(tmp_path / "four", holdout=0.5), path, rows, keys)
    assert (result.rows % 5, result.holdout_rows % 5) == (0, 0) and result.rows * result.holdout_rows > 0
    with pytest.raises(UserError, match="holdout"):
        train_reward(offline(tmp_path / "one", holdout=0.99), path, rows, ["the same"] * 40)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(("successes", "trials", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611)])
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)
