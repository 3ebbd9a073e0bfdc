"""Checks of one section by itself: one line for each mistake."""

from collections.abc import Sequence
from typing import Literal

from configs.errors import UserError
from configs.schema import EvalScorer, Offline, RewardComponent, SamplingParams

# Fields of vLLM's SamplingParams after which a plain softmax is not what was sampled from.
RESHAPING = (
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "logit_bias",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "repetition_penalty",
)
LOSSES = {"sft": (), "reward": ("bradley_terry", "margin", "kwise"), "dpo": ("dpo", "ipo")}
DPO_KEYS = ("beta", "label_smoothing", "length_normalisation")


def check_source(key: str, scorer: RewardComponent | EvalScorer) -> None:
    """Refuse a scorer that is not one model or one function, and keys of a DPO policy without one."""
    if (scorer.model is None) == (scorer.function is None):
        both = "both model and function are" if scorer.model else "neither model nor function is"
        raise UserError(f"{key} ({scorer.name}): {both} given; give one of the two")
    if scorer.reference is not None and scorer.model is None:
        raise UserError(
            f"{key}.reference ({scorer.name}): it goes with a policy that DPO trained; give model, or drop it"
        )
    if scorer.beta is not None and scorer.reference is None:
        raise UserError(
            f"{key}.beta ({scorer.name}): it scales the score of a DPO policy; give its reference, or drop it"
        )


def check_unique(key: str, names: Sequence[str]) -> None:
    """Refuse a name that is given twice."""
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{key}: the name {twice!r} is given twice, and metrics are kept by name; rename one")


def check_loss(key: str, training: Offline, command: Literal["sft", "reward", "dpo"]) -> None:
    """Refuse the loss of another kind of training, and what only DPO reads."""
    if training.loss is not None and training.loss not in LOSSES[command]:
        known = (
            f"choose one of {', '.join(LOSSES[command])}" if LOSSES[command] else "it has one loss: leave the key out"
        )
        raise UserError(f"{key}.loss: headroom {command} has no loss {training.loss!r}; {known}")
    for name in DPO_KEYS:
        if command != "dpo" and getattr(training, name) != Offline.model_fields[name].default:
            raise UserError(f"{key}.{name}: headroom {command} does not read it, headroom dpo does; leave it out")
    if training.loss != "margin" and training.margin_scale != Offline.model_fields["margin_scale"].default:
        raise UserError(f"{key}.margin_scale: it scales what loss margin reads; set {key}.loss=margin, or leave it out")


def check_sampled_distribution(sampling: SamplingParams) -> None:
    """Refuse samples that a plain softmax would not have drawn, unless the recipe allows them."""
    if sampling.temperature == 0:
        raise UserError("sampling.temperature: greedy samples cannot be trained on; set it above 0, usually to 1")
    if sampling.allow_truncated_distribution:
        return
    given = [f"top_p={sampling.top_p:g}"] * (sampling.top_p < 1) + [f"top_k={sampling.top_k}"] * (sampling.top_k > 0)
    given += [f"extra.{name}={sampling.extra[name]}" for name in RESHAPING if name in sampling.extra]
    if given:
        raise UserError(
            f"sampling.{given[0]}: training needs samples of the whole softmax, and this changes what is sampled from; "
            "leave it out, or set sampling.allow_truncated_distribution=true"
        )
