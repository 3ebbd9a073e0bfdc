"""What is evaluated, when, and how samples become per-prompt scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.rows import prompt_text
from configs.schema import EvalTask
from trainers.data import PromptStream, load_rows
from trainers.types import Evaluation, Group, Prompt

ORDER_SEED = 0  # not the run's: every run evaluates on the same prompts, so that runs can be paired


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """An evaluation task with its prompts."""

    task: EvalTask
    prompts: tuple[Prompt, ...]
    rows_hash: str


def prepare(task: EvalTask, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaskData:
    """Load and render the first `task.prompts` prompts of a fixed order; `max_length` is the model's context."""
    stream = _stream(task, tokenizer, max_length)
    prompts = tuple(stream[position] for position in range(min(task.prompts, len(stream))))
    return TaskData(task=task, prompts=prompts, rows_hash=stream.rows_hash)


def unused(task: EvalTask, tokenizer: PreTrainedTokenizerBase, max_length: int, most: int) -> tuple[Prompt, ...]:
    """Return up to `most` prompts that come after those of `prepare`: no text twice, and none that is evaluated."""
    stream = _stream(task, tokenizer, max_length)
    found: dict[str, Prompt] = {}
    evaluated = {prompt_text(stream[position].messages) for position in range(min(task.prompts, len(stream)))}
    for position in range(task.prompts, len(stream)):
        if len(found) == most:
            break
        prompt = stream[position]
        if (text := prompt_text(prompt.messages)) not in evaluated:
            found.setdefault(text, prompt)
    return tuple(found.values())


def _stream(task: EvalTask, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PromptStream:
    longest = min(task.data.max_prompt_tokens, max_length - task.sampling.max_tokens)
    return PromptStream(load_rows(task.data), tokenizer, task.data, longest, ORDER_SEED)


def due_versions(steps: int, every: int) -> tuple[int, ...]:
    """Return the versions that are evaluated: 0, every `every`, and the last."""
    return tuple(sorted({*range(0, steps, every), steps}))


def milestones(steps: int, every: int) -> frozenset[int]:
    """Return the first, the last and the evaluated version nearest to the middle (the earlier of two)."""
    versions = due_versions(steps, every)
    return frozenset({0, steps, min(versions, key=lambda version: abs(2 * version - steps))})


def summarise(
    version: int, task: str, groups: Sequence[Group], raw: Mapping[str, Sequence[Sequence[float]]]
) -> Evaluation:
    """Build the Evaluation of one task; `raw` maps a metric to, per prompt, its samples' scores."""
    samples: list[Mapping[str, Any]] = []
    for number, group in enumerate(groups):
        for place, rollout in enumerate(group.rollouts):
            scores = {metric: columns[number][place] for metric, columns in raw.items()}
            samples.append(
                {
                    "uid": rollout.uid,
                    "prompt": prompt_text(group.prompt.messages),
                    "completion": rollout.text,
                    "tokens": len(rollout.token_ids),
                    "finish_reason": rollout.finish_reason,
                    **{key: value for key, value in group.prompt.row.items() if key in ("type", "label")},
                    **scores,
                }
            )
    return Evaluation(
        version=version,
        task=task,
        prompt_uids=tuple(group.prompt.uid for group in groups),
        scores={
            metric: np.array([np.mean(values) for values in columns], np.float32) for metric, columns in raw.items()
        },
        samples=tuple(samples),
    )
