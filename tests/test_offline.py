"""SFT and reward models by the one `fit`; how a killed training goes on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from configs.errors import UserError
from configs.schema import Offline
from tests.ranks import VOCABULARY, tiny_policy
from trainers.engine import TrainEngine
from trainers.layout import Sequences, tree_width
from trainers.models import ScoreModel, load_sequence_classifier
from trainers.objectives import Rows, reward_objective, shared_length
from trainers.offline import Log, train_dpo, train_reward, train_sft
from trainers.results import Result, load_result, training_hash, wilson
from trainers.unfinished import unfinished


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


def test_a_holdout_that_draws_no_prompt_is_told_and_no_loss_is_made_up(path: str, tmp_path: Path) -> None:
    lines: list[str] = []
    config = offline(tmp_path / "none", holdout=1e-9)
    result = train_reward(config, path, preferences(4), log=lines.append)
    assert any("no prompt fell into holdout=1e-09; raise it" in line for line in lines)
    written = json.loads((tmp_path / "none/result.json").read_text())
    assert (written["loss"], written["loss_before"], written["holdout_rows"]) == (None, None, 0)
    again = load_result(tmp_path / "none", result.config_hash)
    assert again is not None and np.isnan(again.loss)


@pytest.mark.parametrize(("successes", "trials", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611)])
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def rankings(count: int, sizes: tuple[int, ...] = (2, 3, 4)) -> Rows:
    """Texts of one prompt hold words 7, 8, 9, … in this order."""
    rng = np.random.default_rng(2)
    rows = []
    for number in range(count):
        prompt = rng.integers(15, VOCABULARY, rng.integers(2, 7))
        words = range(7, 7 + sizes[number % len(sizes)])
        tails = [rng.integers(15, VOCABULARY, rng.integers(0, 5)) for _ in words]
        rows.append(tuple(np.array([*prompt, w, *tail], np.int32) for w, tail in zip(words, tails, strict=True)))
    return rows


class Counting(nn.Module):
    """A ScoreModel that counts the sequences of each pass."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model = model
        self.passes: list[int] = []

    def forward(self, batch: Sequences) -> torch.Tensor:
        self.passes.append(len(batch.last))
        return self.model(batch)


@pytest.mark.parametrize("tree", [False, True])
def test_a_reward_loss_is_that_of_each_text_alone_whatever_the_batch(path: str, tree: bool) -> None:
    rows = rankings(9)
    torch.manual_seed(0)
    hf = load_sequence_classifier(path, "float32", head="random").eval()
    hf.config.pad_token_id = 0
    assert tree_width(hf) is not None
    with torch.no_grad():
        alone = [[float(hf(torch.tensor(text)[None].long()).logits) for text in texts] for texts in rows]
    expected, right = [], []
    for scores in alone:
        pairs = [(a, b) for i, a in enumerate(scores) for b in scores[i + 1 :]]
        expected.append(np.mean([np.log1p(np.exp(b - a)) for a, b in pairs]))
        right.append(np.mean([a > b for a, b in pairs]))
    model = Counting(ScoreModel(hf))
    objective = reward_objective(rows, tree=tree)
    for chosen in ([0], [3, 1], list(range(9)), list(range(9))[::-1]):
        model.passes.clear()
        with torch.no_grad():
            losses, shares = objective.losses(model, chosen)
        np.testing.assert_allclose(losses, [expected[i] for i in chosen], atol=2e-6)
        np.testing.assert_allclose(shares, [right[i] for i in chosen], atol=1e-6)
        assert model.passes == [sum(len(rows[i]) for i in chosen)], "each text once, all pairs of it in one pass"


def test_margins_ask_for_more(path: str) -> None:
    rows, margins = preferences(6), [0.0, 1.0, 0.5, 2.0, 0.0, 3.0]
    torch.manual_seed(0)
    model = ScoreModel(load_sequence_classifier(path, "float32", head="random").eval())
    with torch.no_grad():
        plain, _ = reward_objective(rows, tree=False).losses(model, range(6))
        asked, _ = reward_objective(rows, tree=False, margins=margins).losses(model, range(6))
    ahead = -(plain.exp() - 1).log()  # the loss is log(1 + exp(-ahead))
    np.testing.assert_allclose(asked, (1 + (torch.tensor(margins) - ahead).exp()).log(), atol=1e-5)


def test_what_texts_share() -> None:
    texts = [np.array(text, np.int32) for text in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3])]
    assert (shared_length(texts), shared_length(texts[::2]), shared_length(texts[:1])) == (2, 3, 4)


def test_a_reward_model_learns_rankings(path: str, tmp_path: Path) -> None:
    rows = rankings(120)
    config = offline(tmp_path / "kwise", epochs=4, loss="kwise")
    result = train_reward(config, path, rows, log=lambda line: None)
    assert result.accuracy is not None and result.accuracy >= 0.9 and result.loss < result.loss_before
    with pytest.raises(UserError, match="more than two texts; set loss=kwise"):
        train_reward(offline(tmp_path / "pairs"), path, rows)
    with pytest.raises(UserError, match="margin for each pair"):
        train_reward(offline(tmp_path / "pairs", loss="margin"), path, preferences(40))


def test_an_output_with_other_things_in_it_is_refused_before_anything_is_trained(path: str, tmp_path: Path) -> None:
    start = Path(tiny_policy(tmp_path / "start"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.jsonl").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = weights(start)
    with pytest.raises(UserError, match=r"start: output is the start weights themselves; give another directory"):
        train_reward(offline(start), str(start), preferences(40))
    for name in ("data", "file"):
        with pytest.raises(UserError, match=f"{name}: holds something that is no training's result"):
            train_reward(offline(tmp_path / name), path, preferences(40))
    assert weights(start) == before and (tmp_path / "data/data.jsonl").exists() and (tmp_path / "file").exists()


@pytest.mark.parametrize("told", ["", "[]", '{"accuracy": 0.5}', '{"kind": "reward", "config_hash": "0"}'])
def test_an_output_whose_result_another_program_wrote_is_refused(path: str, tmp_path: Path, told: str) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/result.json").write_text(told)
    (tmp_path / "bench/log").write_text("mine")
    with pytest.raises(UserError, match="bench: holds a result.json that no training of Headroom wrote; give another"):
        train_reward(offline(tmp_path / "bench"), path, preferences(40))
    assert (tmp_path / "bench/log").read_text() == "mine"


def test_an_output_is_replaced_by_its_own_command_only(path: str, tmp_path: Path) -> None:
    rows = preferences(40)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result.json").write_text("{}\n")  # as the demo's random start has it
    first = train_reward(offline(tmp_path / "out"), path, rows)
    assert train_reward(offline(tmp_path / "out", seed=1), path, rows).config_hash != first.config_hash
    before = weights(tmp_path / "out")
    with pytest.raises(UserError, match="out: holds what headroom reward has trained; give another directory"):
        train_sft(offline(tmp_path / "out"), path, rows)
    assert weights(tmp_path / "out") == before


@pytest.mark.parametrize("content", ["", '{"loss": 1', "{}", "[]", '{"seconds": 3}'])
def test_a_result_that_is_not_ours_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    assert load_result(tmp_path, "hash") is None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_other_start_weights_have_another_hash(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    hashes = set()
    for content in ("one", "two"):
        (tmp_path / name).write_text(content)
        hashes.add(training_hash("sft", offline(tmp_path / "out"), str(tmp_path), preferences(1)))
    assert len(hashes) == 2


def trained(
    kind: str, output: Path, path: str, *, ends: Callable[[int], None] | None = None, log: Log = print, **fields: object
) -> Result:
    """Train one of each kind: batches of 4 rows, checkpoints every 3 steps; `ends` may end it after a step."""
    config = offline(output, epochs=3, batch=4, checkpoint_every=3, **fields)
    rows = preferences(24)

    def note(step: int, metrics: Mapping[str, float]) -> None:
        if ends is not None:
            ends(step)

    kinds = {"sft": train_sft, "reward": train_reward, "dpo": train_dpo}
    if kind == "dpo":
        shared = [shared_length(texts) for texts in rows]
        rows = [(a[:both], a[both:], b[both:]) for (a, b), both in zip(rows, shared, strict=True)]
    return kinds[kind](config, path, rows, log=log, track=lambda directory, step: nullcontext(note))


class Stop(BaseException):
    """What ends a training in the middle."""


def stops_at(last: int) -> Callable[[int], None]:
    def ends(step: int) -> None:
        if step == last:
            raise Stop

    return ends


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_training_that_was_stopped_goes_on_bit_equal(path: str, tmp_path: Path, kind: str) -> None:
    whole = trained(kind, tmp_path / "whole", path)
    lines: list[str] = []
    for step in (2, 8, 8):  # before the first checkpoint, and twice behind the second
        with pytest.raises(Stop):
            trained(kind, tmp_path / "again", path, ends=stops_at(step), log=lines.append)
    result = trained(kind, tmp_path / "again", path, log=lines.append)
    assert [line for line in lines if "goes on" in line] == [
        f"{tmp_path / 'again'}: goes on after step 6 of {whole.steps}"
    ] * 2
    assert weights(tmp_path / "again") == weights(tmp_path / "whole") != weights(Path(path))
    assert (result.loss_before, result.loss) == (whole.loss_before, whole.loss)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "again", tmp_path / "whole"], "nothing else is left"


def test_a_changed_training_starts_anew_and_a_second_one_is_refused(path: str, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(Stop):
        trained("dpo", tmp_path / "out", path, ends=stops_at(8), log=lines.append)
    trained("dpo", tmp_path / "out", path, log=lines.append, beta=0.3)
    assert [line for line in lines if "anew" in line or "goes on" in line] == [
        f"{tmp_path / 'out.checkpoint'}: of another configuration, start weights or rows; starting anew"
    ]
    trained("dpo", tmp_path / "fresh", path, beta=0.3)
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh")
    with unfinished(tmp_path / "out", "another", 1, print), pytest.raises(UserError, match=r"another launch .* output"):
        trained("dpo", tmp_path / "out", path)


def test_a_margin_is_scaled_and_moves_the_loss(path: str, tmp_path: Path) -> None:
    """Before training scores are near each other, so the loss is about log(1 + exp(margin)) of the scaled margin."""
    rows = preferences(60)
    before = {}
    for scale in (0.1, 1.0):
        config = offline(tmp_path / str(scale), loss="margin", margin_scale=scale)
        before[scale] = train_reward(config, path, rows, margins=[5.0] * 60).loss_before
    plain = train_reward(offline(tmp_path / "plain"), path, rows, margins=[5.0] * 60).loss_before
    assert plain < before[0.1] < 2 and 4 < before[1.0] < 7


def test_a_loss_that_is_no_number_ends_the_training(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 1 of \d+: the loss is nan, .*; lower"):
        train_reward(offline(tmp_path / "nan", loss="margin"), path, preferences(40), margins=[float("nan")] * 40)
    assert not (tmp_path / "nan").exists()


def test_a_gradient_that_is_no_number_ends_the_training(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainEngine.step

    def overflows(*args: Any) -> float:
        step(*args)
        return float("inf")

    monkeypatch.setattr(TrainEngine, "step", overflows)
    with pytest.raises(UserError, match=r"step 1 of \d+: the loss is \d.*, the norm of its gradient inf; lower"):
        train_reward(offline(tmp_path / "inf"), path, preferences(40))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_that_was_killed_goes_on_bit_equal(path: str, tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "tests.test_offline",
        path,
        str(tmp_path / "killed"),
        str(torch.get_num_threads()),
    ]
    child = subprocess.run(arguments, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=500)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (tmp_path / "killed").exists() and list((tmp_path / "killed.checkpoint/checkpoints").iterdir())
    lines: list[str] = []
    trained("dpo", tmp_path / "killed", path, log=lines.append)
    assert any("goes on after step 6 of " in line for line in lines)
    trained("dpo", tmp_path / "whole", path)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def kill(step: int) -> None:
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # the process that the last test starts, which is killed after step 8
    torch.set_num_threads(int(sys.argv[3]))
    trained("dpo", Path(sys.argv[2]), sys.argv[1], ends=kill)
