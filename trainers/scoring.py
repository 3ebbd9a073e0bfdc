"""Reward models, reward functions, and how their scores combine. Pure torch and Python: no Ray."""

import asyncio
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from configs.errors import UserError
from configs.rows import prompt_text
from trainers.data import conversation_ids
from trainers.microbatch import pack
from trainers.models import DType, ScoreModel, load_sequence_classifier
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
        self.model: torch.nn.Module = ScoreModel(hf) if hasattr(hf, "score") else hf
        self.model.to(self.device).eval()
        self.pad_id = config.get_text_config().pad_token_id or 0

    def score(self, items: Sequence[Judged]) -> list[float]:
        """Return one raw score per item; it does not depend on what else is in the batch."""
        sequences = [
            conversation_ids(self.tokenizer, item.messages, item.completion, self.max_length) for item in items
        ]
        scores = [math.nan] * len(items)
        for batch in pack(range(len(items)), [len(ids) for ids in sequences], self.token_budget):
            for index, value in zip(batch, self._forward([sequences[i] for i in batch]), strict=True):
                scores[index] = value
        return scores

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        # Padded to the right whatever the tokenizer prefers: then positions need no correction.
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        scores = output if isinstance(output, torch.Tensor) else output.logits[:, 0]
        values: list[float] = scores.float().tolist()
        return values


class RuleFunction:
    """A plain Python function `module:function`, called with (prompt, completion, row) -> float.

    It may be async. Raises UserError if it cannot be imported.
    """

    def __init__(self, spec: str, *, deadline_s: float = 60) -> None:
        self.spec = spec
        self.deadline_s = deadline_s
        self.function = import_function(spec)

    async def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """Return the score. Raises DataError if the function raises, runs out of time or gives no finite number."""
        try:
            async with asyncio.timeout(self.deadline_s):
                if inspect.iscoroutinefunction(self.function):
                    value = await self.function(prompt, completion, row)
                else:
                    value = await _in_daemon_thread(self.function, prompt, completion, row)
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


async def _in_daemon_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run a blocking call; a daemon thread, so that one which never returns cannot keep the process alive."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            result = function(*args)
        except BaseException as error:
            if not future.cancelled():
                future.set_exception(error)
        else:
            if not future.cancelled():
                future.set_result(result)

    threading.Thread(target=call, daemon=True).start()
    return await asyncio.wrap_future(future)
