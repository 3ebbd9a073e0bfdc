"""Reward models, reward functions, and how their scores combine. Pure torch and Python: no Ray."""

import asyncio
import importlib
import inspect
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from configs.errors import UserError
from configs.rows import prompt_text
from trainers.data import completion_ids, conversation_ids, prompt_ids
from trainers.layout import sequences, tree_width
from trainers.microbatch import bundle, pack, plan
from trainers.models import DType, ScoreModel, completion_logprobs, load_policy, load_sequence_classifier
from trainers.types import DataError, Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One completion in its conversation, as a reward model sees it."""

    messages: tuple[Message, ...]
    completion: str


class RewardModel:
    """An HF sequence-classification model with one output, its own tokenizer and its own chat template.

    Raises UserError if the model has more than one output or has no tokenizer beside it.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: DType = "float32",
        max_length: int = 1024,
        token_budget: int = 16_384,
        device: str | None = None,
        share_prompts: bool = True,
    ) -> None:
        config = AutoConfig.from_pretrained(path)
        if config.num_labels != 1:
            raise UserError(
                f"reward model {path}: it has {config.num_labels} outputs; give a model with one (num_labels: 1)"
            )
        self.path = path
        self.max_length = max_length
        self.token_budget = token_budget
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        hf = load_sequence_classifier(path, dtype)
        # Encoders pool with a head of their own; decoders are read at the last real token, as they were trained.
        self.decoder = hasattr(hf, "score")
        self.model: torch.nn.Module = ScoreModel(hf) if self.decoder else hf
        self.width = tree_width(hf) if self.decoder and share_prompts else None
        self.model.to(self.device).eval()
        self.pad_id = config.get_text_config().pad_token_id or 0

    @torch.inference_mode()
    def score(self, items: Sequence[Judged]) -> list[float]:
        """Return one raw score per item; up to rounding it does not depend on what else is in the batch."""
        texts = [conversation_ids(self.tokenizer, item.messages, item.completion, self.max_length) for item in items]
        return self._decode(items, texts) if self.decoder else self._encode(texts)

    def _decode(self, items: Sequence[Judged], texts: Sequence[Sequence[int]]) -> list[float]:
        shared = _shared_lengths([prompt_text(item.messages) for item in items], texts)
        prompts = [np.array(text[:n], np.int32) for text, n in zip(texts, shared, strict=True)]
        rests = [np.array(text[n:], np.int32) for text, n in zip(texts, shared, strict=True)]
        lengths = [len(rest) for rest in rests]
        scores = [math.nan] * len(items)
        bundles = bundle(range(len(items)), prompts, lengths, self.token_budget, width=self.width)
        for micro in plan(bundles, self.token_budget)[0]:
            chosen = [prompts[i] for i in micro.rows], [rests[i] for i in micro.rows]
            values = self.model(sequences(*chosen, self.device, bundles=micro.bundles))
            for index, value in zip(micro.rows, values.float().tolist(), strict=True):
                scores[index] = value
        return scores

    def _encode(self, texts: Sequence[Sequence[int]]) -> list[float]:
        scores = [math.nan] * len(texts)
        for batch in pack(range(len(texts)), [len(text) for text in texts], self.token_budget):
            # Padded to the right whatever the tokenizer prefers: then positions need no correction.
            width = max(len(texts[i]) for i in batch)
            ids = torch.full((len(batch), width), self.pad_id, dtype=torch.long)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : len(texts[i])] = torch.tensor(texts[i])
                mask[row, : len(texts[i])] = 1
            values = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits[:, 0]
            for index, value in zip(batch, values.float().tolist(), strict=True):
                scores[index] = value
        return scores


class ImplicitReward:
    """A policy that DPO trained, read as a reward model: beta (log pi - log pi0) of the completion, summed over tokens.

    Up to a constant of the prompt it is the reward that the policy is optimal for, at that beta (Rafailov et al. 2023,
    eq. 5). Texts are rendered by the policy's chat template, as plain text where it has none. Raises UserError if
    policy and reference do not share a vocabulary.
    """

    def __init__(
        self,
        path: str,
        reference: str,
        *,
        beta: float,
        dtype: DType = "float32",
        max_length: int = 1024,
        token_budget: int = 16_384,
        device: str | None = None,
        share_prompts: bool = True,
    ) -> None:
        self.path = path
        self.beta = beta
        self.max_length = max_length
        self.token_budget = token_budget
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if self.tokenizer.get_vocab() != AutoTokenizer.from_pretrained(reference).get_vocab():
            raise UserError(f"reward model {path}: reference {reference} has other tokens; give its start weights")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.policy, self.reference = (load_policy(of, dtype).to(self.device).eval() for of in (path, reference))
        self.width = tree_width(self.policy.hf) if share_prompts else None

    @torch.inference_mode()
    def score(self, items: Sequence[Judged]) -> list[float]:
        """Return one raw score per item; up to rounding it does not depend on what else is in the batch."""
        render = "text" if self.tokenizer.chat_template is None else "chat"
        completions = [
            completion_ids(self.tokenizer, item.messages, item.completion, render)[: self.max_length - 1]
            for item in items
        ]
        # Beyond max_length the beginning is cut off, as for every reward model.
        prompts = [
            prompt_ids(self.tokenizer, item.messages, render)[len(completion) - self.max_length :]
            for item, completion in zip(items, completions, strict=True)
        ]
        sums = [
            [
                float(values.sum(dtype=np.float64))
                for values in completion_logprobs(model, prompts, completions, 1.0, self.token_budget, width=self.width)
            ]
            for model in (self.policy, self.reference)
        ]
        return [self.beta * (own - start) for own, start in zip(*sums, strict=True)]


def _shared_lengths(conversations: Sequence[str], texts: Sequence[Sequence[int]]) -> list[int]:
    """Return how many tokens at its start each text has in common with all those of the same conversation."""
    families: dict[str, list[int]] = {}
    for i, conversation in enumerate(conversations):
        families.setdefault(conversation, []).append(i)
    shared = [0] * len(texts)
    for family in families.values():
        common = len(os.path.commonprefix([list(texts[i]) for i in family]))
        for i in family:
            shared[i] = max(common, 1)
    return shared


class RuleFunction:
    """A plain Python function `module:function`, called with (prompt, completion, row) -> float.

    It may be async. One that is not may have an attribute `queue`, a context manager that it is called in; what is
    waited for there is no part of `deadline_s`. Raises UserError if it cannot be imported.
    """

    def __init__(self, spec: str, *, deadline_s: float = 60) -> None:
        self.spec = spec
        self.deadline_s = deadline_s
        self.function = import_function(spec)

    async def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """Return the score. Raises DataError if the function raises, runs out of time or gives no finite number."""
        try:
            if inspect.iscoroutinefunction(self.function):
                call = self.function(prompt, completion, row)
            else:
                call = asyncio.wrap_future(await _begin(self.function, prompt, completion, row))
            async with asyncio.timeout(self.deadline_s):
                value = await call
            score = float(value)
        except TimeoutError as error:
            raise DataError(f"{self.spec} took longer than {self.deadline_s:g} s") from error
        except Exception as error:  # the user's code: whatever it raises is about this sample
            raise DataError(f"{self.spec} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(score):
            raise DataError(f"{self.spec} returned {score}")
        return score


def combine(raw: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted sum of raw component scores."""
    return sum(weights[name] * value for name, value in raw.items())


def finite(value: float, component: str, sample: str) -> float:
    """Return `value`. Raises DataError naming component and sample if it is NaN or infinite."""
    if not math.isfinite(value):
        raise DataError(f"reward component {component!r}, sample {sample}: {value}")
    return value


async def apply_rule(
    rule: RuleFunction, component: str, prompt: Prompt, completions: Sequence[tuple[str, str]]
) -> list[float]:
    """Score (sample uid, completion) pairs. Raises DataError naming component and sample."""
    text = prompt_text(prompt.messages)

    async def one(uid: str, completion: str) -> float:
        try:
            return await rule(text, completion, prompt.row)
        except DataError as error:
            raise DataError(f"reward component {component!r}, sample {uid}: {error}") from error

    return list(await asyncio.gather(*(one(uid, completion) for uid, completion in completions)))


def import_function(spec: str) -> Callable[..., Any]:
    """Import `module:function`. Raises UserError if there is no such thing."""
    module, _, name = spec.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"function {spec!r}: {error}; give it as module:function, importable from here") from error
    if not callable(function):
        raise UserError(f"function {spec!r}: it is not callable")
    return function


async def _begin(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Return the future of a blocking call that has begun, after its wait in `function.queue` if there is one.

    In a daemon thread, so that a call which never returns cannot keep the process alive.
    """
    begun: Future[None] = Future()
    result: Future[Any] = Future()

    def call() -> None:
        try:
            with getattr(function, "queue", nullcontext()):
                if begun.set_running_or_notify_cancel():  # else nobody waits any more
                    begun.set_result(None)
                    result.set_result(function(*args))
        except BaseException as error:
            waited = result if begun.done() else begun
            if not waited.cancelled():
                waited.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    await asyncio.wrap_future(begun)
    return result
