"""`headroom sft`, `headroom reward` and `headroom dpo`: supervised trainings of a recipe, each in this one process."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from configs.errors import UserError
from configs.schema import Offline, Recipe
from trainers.comparisons import choices, rankings
from trainers.data import Examples, load_demonstrations, load_pairs, load_rows, load_tokenizer, margins_of
from trainers.objectives import Rows
from trainers.offline import Track, train_dpo, train_reward, train_sft
from trainers.results import Result
from trainers.training_tracker import TrainingTracker

log = logging.getLogger("headroom")


def sft(recipe: Recipe) -> Result:
    """Train the policy's start weights as section `sft` says. Raises UserError for data that cannot be used."""
    if recipe.sft is None:
        raise UserError("sft: the recipe has no such section; add one with output and data")
    config = recipe.sft
    base = _base(config, recipe)
    examples = load_demonstrations(config.data, load_tokenizer(base), config.max_length)
    track = _start(recipe, "sft", config, examples)
    rows = [(example.prompt, example.completion) for example in examples.items]
    result = train_sft(config, base, rows, log=log.info, track=track)
    _say(config, result)
    return result


def reward(recipe: Recipe, names: Sequence[str]) -> dict[str, Result]:
    """Train the reward models `names`, one after the other. Raises UserError for data that cannot be used."""
    return {name: _reward(name, recipe.reward_models[name], recipe) for name in names}


def dpo(recipe: Recipe) -> Result:
    """Train a policy on preferences as section `dpo` says. Raises UserError for data that cannot be used."""
    if recipe.dpo is None:
        raise UserError("dpo: the recipe has no such section; add one with output and data")
    config = recipe.dpo
    base = _base(config, recipe)
    examples = choices(load_rows(config.data), config.data, load_tokenizer(base), config.max_length)
    track = _start(recipe, "dpo", config, examples)
    rows = [(choice.prompt_ids, choice.chosen, choice.rejected) for choice in examples.items]
    keys = [choice.prompt for choice in examples.items]
    result = train_dpo(config, base, rows, keys, log=log.info, track=track)
    _say(config, result)
    return result


def _reward(name: str, config: Offline, recipe: Recipe) -> Result:
    base = _base(config, recipe)
    tokenizer = load_tokenizer(base)
    margins: list[float] | None = None
    if config.loss == "kwise":
        ranked = rankings(load_rows(config.data), config.data, tokenizer, config.max_length)
        track = _start(recipe, f"reward model {name}", config, ranked)
        rows: Rows = [ranking.texts for ranking in ranked.items]
        keys = [ranking.prompt for ranking in ranked.items]
    else:
        pairs = load_pairs(config.data, tokenizer, config.max_length)
        margins = margins_of(pairs.items, config.data) if config.loss == "margin" else None
        track = _start(recipe, f"reward model {name}", config, pairs)
        rows = [(pair.chosen, pair.rejected) for pair in pairs.items]
        keys = [pair.prompt for pair in pairs.items]
    result = train_reward(config, base, rows, keys, margins=margins, log=log.info, track=track)
    _say(config, result)
    return result


def _base(config: Offline, recipe: Recipe) -> str:
    return config.base or recipe.model.path


def _start(recipe: Recipe, what: str, config: Offline, examples: Examples[Any]) -> Track:
    """Say what is trained on, and return how it is tracked."""
    torch.set_num_threads(config.engine.threads or os.cpu_count() or 1)
    left_out = f", {examples.too_long} longer than {config.max_length} tokens left out" if examples.too_long else ""
    log.info("%s: %d rows%s -> %s", what, len(examples.items), left_out, config.output)
    return partial(TrainingTracker, recipe, what, config, examples.rows_hash)


def _say(config: Offline, result: Result) -> None:
    log.info("%s: held-out loss %.4f (before %.4f)", config.output, result.loss, result.loss_before)
    if result.accuracy is not None:
        log.info(
            "%s: held-out accuracy %.3f [%.3f, %.3f] on %d rows, %.0f s",
            config.output,
            result.accuracy,
            result.accuracy_low,
            result.accuracy_high,
            result.holdout_rows,
            result.seconds,
        )
