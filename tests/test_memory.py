"""What the log-prob head may hold at once at a vocabulary of 49,152, and that the bound changes no number."""

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.ranks import VOCABULARY, tiny_policy
from tests.tiny import llama
from trainers.layout import Sequences, sequences
from trainers.models import LOGITS_KEPT, LOGITS_PER_CHUNK, PolicyModel

WIDE = 49_152
BOUND = 4 * (LOGITS_KEPT + 4 * LOGITS_PER_CHUNK)  # bytes
UNBOUND = {"logits_per_chunk": 2**40, "logits_kept": 2**40}


@pytest.fixture(scope="module")
def wide() -> LlamaForCausalLM:
    """A model of which the head is everything: a hidden state has 128 bytes, its logits have 196,608."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama(vocab_size=WIDE, num_hidden_layers=1))


def texts(rows: int, length: int) -> Sequences:
    rng = np.random.default_rng(0)
    drawn = rng.integers(4, WIDE, (rows, length + 4)).astype(np.int32)
    return sequences(list(drawn[:, :4]), list(drawn[:, 4:]), "cpu")


def peak_bytes(work: Callable[[], Any], path: Path) -> int:
    """Return the most that `work` held at once, from a trace of every allocation that torch makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    trace.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    assert events
    return max(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))


def train(policy: PolicyModel, batch: Sequences) -> None:
    policy.zero_grad()
    policy(batch)[0].sum().backward()


@pytest.mark.parametrize("rows", [8, 12])
def test_the_head_stays_within_its_bound_however_many_tokens_there_are(
    wide: LlamaForCausalLM, tmp_path: Path, rows: int
) -> None:
    batch = texts(rows, 256)
    assert peak_bytes(lambda: train(PolicyModel(wide), batch), tmp_path / "trace.json") < BOUND


def test_without_chunks_the_head_exceeds_the_bound(wide: LlamaForCausalLM, tmp_path: Path) -> None:
    batch = texts(8, 256)
    assert peak_bytes(lambda: train(PolicyModel(wide, **UNBOUND), batch), tmp_path / "trace.json") > 2 * BOUND


def test_without_gradients_a_chunk_is_all_there_is(wide: LlamaForCausalLM, tmp_path: Path) -> None:
    batch, bound = texts(8, 256), 4 * 4 * LOGITS_PER_CHUNK
    with torch.no_grad():
        assert peak_bytes(lambda: PolicyModel(wide)(batch), tmp_path / "trace.json") < bound
        assert peak_bytes(lambda: PolicyModel(wide, **UNBOUND)(batch), tmp_path / "trace.json") > 2 * bound


@pytest.mark.parametrize("kept", [0, 3, 4, 9, 1000], ids="{}-tokens-kept".format)
def test_what_is_kept_and_what_is_computed_again_give_the_same_gradients(tmp_path: Path, kept: int) -> None:
    path = tiny_policy(tmp_path)
    rng = np.random.default_rng(0)
    prompts, completions = ([rng.integers(3, VOCABULARY, n).astype(np.int32) for n in (5, 1, 7)] for _ in range(2))
    found = []
    for sizes in ({"logits_per_chunk": 3 * VOCABULARY, "logits_kept": kept * VOCABULARY}, UNBOUND):
        policy = PolicyModel(AutoModelForCausalLM.from_pretrained(path), **sizes)
        logprobs, entropies = policy(sequences(prompts, completions, "cpu"), temperature=0.7)
        logprobs.square().sum().backward()
        found.append([logprobs, entropies, *(parameter.grad for parameter in policy.parameters())])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
