"""`headroom sft`, `reward` and `eval` from the command line, one after the other, on real DeepSpeed, Ray and vLLM."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.__main__ import main
from tests import tiny

ROOT = Path(__file__).parents[1]
RULES = "def says_yes(prompt, completion, row):\n    return float(completion == 'yes')\n"


def make_recipe(where: Path) -> None:
    """Write a recipe whose demonstrations answer `yes` to all, and whose preferences agree."""
    tiny.policy(where / "policy", hidden_size=64, num_attention_heads=2)  # heads of 32, as vLLM's kernels want them
    questions = [f"is {a} {b}?" for a in "abcdefgh" for b in "stuvwxyz"]
    pairs = [{"prompt": question, "chosen": "yes", "rejected": "no"} for question in questions]
    for name, rows in {"pairs": pairs, "prompts": [{"prompt": question} for question in questions]}.items():
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "rules.py").write_text(RULES)
    data = {"path": "prompts.jsonl", "render": "text"}
    preferences = {"path": "pairs.jsonl", "format": "pairs"}
    offline = {
        "batch": 8,
        "epochs": 8,
        "engine": {"zero": 0, "threads": 1, "optimizer": {"learning_rate": 1e-2}},
    }
    scorers = [{"name": "yes", "function": "rules:says_yes"}, {"name": "proxy", "model": "proxy"}]
    tree = {
        "run": {"name": "case"},
        "model": {"path": "policy", "dtype": "float32", "max_length": 64},
        "data": data,
        "evaluation": {
            "kv_cache_gb": 0.25,
            "tasks": [
                {"name": "held", "data": data, "prompts": 16, "sampling": {"n": 1, "max_tokens": 6}, "scorers": scorers}
            ],
        },
        # Absolute: MLflow keeps one store a process for each address, whatever directory a later test works in.
        "tracking": {"uri": f"sqlite:///{where}/mlflow.db"},
        "sft": {"output": "tuned", "data": {**preferences, "render": "text"}, **offline},
        "reward_models": {"proxy": {"output": "proxy", "data": preferences, **offline}},
    }
    (where / "recipe.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_sft_and_reward_trained_is_what_eval_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["sft", "recipe.yaml"]) == 0
    assert main(["reward", "recipe.yaml"]) == 0
    sft, reward = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("tuned", "proxy"))
    assert sft["loss"] < 0.5 * sft["loss_before"] and reward["accuracy"] > 0.9

    found = subprocess.run(
        [sys.executable, "-m", "cluster", "eval", "recipe.yaml", "--checkpoint", "tuned"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    means = {key: float(mean) for key, mean in re.findall(r"^(\S+)  (\S+) ± \S+  \(n = 16\)$", found.stdout, re.M)}
    assert means.keys() == {"held/yes", "held/proxy"}
    assert means["held/yes"] > 0.8  # the policy at model.path never says it
    assert (tmp_path / "mlflow.db").exists()
