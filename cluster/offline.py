"""`headroom sft` and `headroom reward`: supervised trainings of a recipe, each in this one process."""

import logging
import os
from collections.abc import Sequence

import torch

from configs.errors import UserError
from configs.schema import Offline, Recipe
from trainers.data import load_demonstrations, load_pairs, load_tokenizer
from trainers.offline import Result, train_reward, train_sft

log = logging.getLogger("headroom")


def sft(recipe: Recipe) -> Result:
    """Train the policy's start weights as section `sft` says. Raises UserError for data that cannot be used."""
    if recipe.sft is None:
        raise UserError("sft: the recipe has no such section; add one with output and data")
    config = recipe.sft
    base = _base(config, recipe)
    examples = load_demonstrations(config.data, load_tokenizer(base), config.max_length)
    _start("sft", config, len(examples.items), examples.too_long)
    rows = [(example.prompt, example.completion) for example in examples.items]
    result = train_sft(config, base, rows, log=log.info)
    log.info("%s: held-out loss %.4f (before %.4f)", config.output, result.loss, result.loss_before)
    return result


def reward(recipe: Recipe, names: Sequence[str]) -> dict[str, Result]:
    """Train the reward models `names`, one after the other. Raises UserError for data that cannot be used."""
    return {name: _reward(name, recipe.reward_models[name], recipe) for name in names}


def _reward(name: str, config: Offline, recipe: Recipe) -> Result:
    base = _base(config, recipe)
    pairs = load_pairs(config.data, load_tokenizer(base), config.max_length)
    _start(f"reward model {name}", config, len(pairs.items), pairs.too_long)
    rows = [(pair.chosen, pair.rejected) for pair in pairs.items]
    result = train_reward(config, base, rows, [pair.prompt for pair in pairs.items], log=log.info)
    if result.accuracy is not None:
        log.info(
            "%s: held-out accuracy %.3f [%.3f, %.3f] on %d pairs, %.0f s",
            config.output,
            result.accuracy,
            result.accuracy_low,
            result.accuracy_high,
            result.holdout_rows,
            result.seconds,
        )
    return result


def _base(config: Offline, recipe: Recipe) -> str:
    return config.base or recipe.model.path


def _start(what: str, config: Offline, count: int, too_long: int) -> None:
    torch.set_num_threads(config.engine.threads or os.cpu_count() or 1)
    left_out = f", {too_long} longer than {config.max_length} tokens left out" if too_long else ""
    log.info("%s: %d rows%s -> %s", what, count, left_out, config.output)
