"""Helpers of the engine tests: a tiny model, a batch of unequal lengths, and work in a process group of its own."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from configs.schema import Recipe
from tests.tiny import llama
from trainers.learner import Learner
from trainers.types import Batch

VOCABULARY = 61
RUNS = tuple(("grpo", zero) for zero in (0, 2, 3))  # of `train_and_publish`: algorithm and ZeRO stage


def tiny_policy(directory: Path, *, tied: bool = True, seed: int = 0) -> str:
    """Write a random Llama of 2 layers and 32 hidden units with a tokenizer of whole words."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(llama(**tokens, tie_word_embeddings=tied, initializer_range=0.2)).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(directory)
    return str(directory)


def random_batch(*, seed: int = 0, groups: int = 3, n: int = 4, longest: int = 9) -> Batch:
    """Draw a batch whose prompts and completions all differ in length."""
    rng = np.random.default_rng(seed)
    rows = groups * n
    lengths = rng.integers(1, longest + 1, rows)
    lengths[0] = longest
    mask = np.arange(longest) < lengths[:, None]
    prompts = [rng.integers(3, VOCABULARY, rng.integers(2, 12)).astype(np.int32) for _ in range(groups)]
    behaviour = rng.normal(-4, 0.3, mask.shape).astype(np.float32) * mask
    return Batch(
        version=0,
        uids=tuple(f"s{seed}-{i}" for i in range(rows)),
        prompt_ids=tuple(prompts[i // n] for i in range(rows)),
        completion_ids=(rng.integers(3, VOCABULARY, mask.shape) * mask).astype(np.int32),
        mask=mask,
        behaviour_logprobs=behaviour,
        reference_logprobs=(behaviour + rng.normal(0, 0.1, mask.shape) * mask).astype(np.float32),
        token_versions=np.zeros(mask.shape, np.int32),
        rewards=rng.normal(size=rows).astype(np.float32),
        groups=np.repeat(np.arange(groups), n).astype(np.int32),
    )


def recipe(path: str, **sections: dict[str, Any]) -> Recipe:
    """Return a recipe for the tiny policy in fp32."""
    learner = {"optimizer": {"learning_rate": 1e-2}, **sections.pop("learner", {})}
    return Recipe.model_validate(
        {
            "run": {"name": "test", "steps": 10},
            "model": {"path": path, "dtype": "float32"},
            "data": {"path": "none"},
            "learner": learner,
            **sections,
        }
    )


def train_and_publish(
    path: str,
    runs: Sequence[tuple[str, int]],
    rank: int,
    ranks: int,
    port: int,
    directory: str,
    learner: dict[str, Any],
) -> None:
    """Take 2 steps in each of `runs`, and write what each published: body of a rank of the equality test."""
    torch.set_num_threads(1)
    for name, zero in runs:
        config = recipe(path, learner={"zero": zero, **learner}, algorithm={"name": name, "minibatches": 2})
        trained = Learner(config, rank, ranks, "127.0.0.1", port)
        head = trained.engine.model.module
        head.logits_per_chunk, head.logits_kept = 2 * VOCABULARY, 4 * VOCABULARY  # ranks differ in their chunks
        stats = [trained.step(random_batch(seed=seed)) for seed in range(2)]
        state = trained.state_dict_for_publish()
        probe = trained.probe_logprobs(np.arange(5, 15, dtype=np.int32))
        trained.save(Path(directory) / f"{name}-zero{zero}")
        if rank == 0:
            result = {"state": state, "probe": probe, "metrics": [dict(s.metrics) for s in stats]}
            torch.save(result, Path(directory) / f"{name}-zero{zero}.pt")


if __name__ == "__main__":  # one rank, started by tests/test_learner.py
    train_and_publish(**json.loads(sys.argv[1]))
