"""Checks of one section by itself: one line for each mistake."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from configs.algorithms import FACTS
from configs.errors import UserError
from configs.formats import lacking
from configs.schema import Algorithm, Data, EvalScorer, Offline, Recipe, RewardComponent, SamplingParams

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
PER_TOKEN = ("ppo", "reinforce_pp")
PAIRS = ("online_dpo", "online_ipo")
SURROGATES = tuple(name for name in FACTS if name not in ("cispo", "rft", *PAIRS))
READ_BY = {
    "clip_low": (*SURROGATES, "cispo"),
    "clip_high": (*SURROGATES, "cispo"),
    "ratio": (*SURROGATES, "cispo"),
    "proximal": (*SURROGATES, "cispo"),
    "off_policy": (*SURROGATES, "cispo"),
    "normalise": (*SURROGATES, "cispo"),
    "dual_clip": SURROGATES,
    "aggregate": (*SURROGATES, "cispo", "rft"),
    "gamma": PER_TOKEN,
    "lam": ("ppo",),
    "value_clip": ("ppo",),
    "best": ("rft",),
    "pair_labels": PAIRS,
}
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


def check_outputs(recipe: Recipe) -> None:
    """Refuse a supervised training that would replace its own start weights, or what another one has trained."""
    named = {"sft": recipe.sft, **{f"reward_models.{name}": t for name, t in recipe.reward_models.items()}}
    places: dict[Path, str] = {}
    for key, training in {**named, "dpo": recipe.dpo}.items():
        if training is None:
            continue
        place = Path(training.output).resolve()
        if place == Path(training.base or recipe.model.path).expanduser().resolve():
            start = f"{key}.base" if training.base else "model.path"
            raise UserError(f"{key}.output: {training.output} is {start}, its own start weights; give another one")
        if place in places:
            raise UserError(f"{key}.output: {training.output} is {places[place]}.output too; give each one of its own")
        places[place] = key


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


def check_data(key: str, training: Offline, command: Literal["sft", "reward", "dpo"]) -> None:
    """Refuse data without what this kind of training needs, and keys of the section that it does not read."""
    data = training.data
    if wrong := lacking(data, preferences=command != "sft"):
        raise UserError(f"{key}.data.{wrong}")
    if data.max_prompt_tokens != Data.model_fields["max_prompt_tokens"].default:
        raise UserError(
            f"{key}.data.max_prompt_tokens: headroom {command} does not read it, {key}.max_length bounds prompt and "
            "completion together; leave it out"
        )
    if command == "reward" and data.render != Data.model_fields["render"].default:
        raise UserError(
            f"{key}.data.render: headroom reward does not read it: a reward model's texts are in its tokenizer's chat "
            "template, or plain where there is none; leave it out"
        )


def check_options(algorithm: Algorithm) -> None:
    """Refuse options of section `algorithm` that this algorithm does not read; its own defaults are never refused."""
    name, facts = algorithm.name, FACTS[algorithm.name]
    own = Algorithm.model_validate({"name": name})
    for key, readers in READ_BY.items():
        if name not in readers and getattr(algorithm, key) != getattr(own, key):
            raise UserError(f"algorithm.{key}: {name} does not read it; leave it out")
    if algorithm.informative_groups and not facts.needs_group:
        raise UserError(f"algorithm.informative_groups: {name} compares no group; set it to false")
    if algorithm.ratio == "sequence" and name in PER_TOKEN:
        raise UserError(f"algorithm.ratio: {name} has an advantage for each token; set algorithm.ratio=token")
    if algorithm.fixed_length is not None and algorithm.aggregate != "fixed":
        raise UserError("algorithm.fixed_length: read with algorithm.aggregate=fixed only; set that, or leave it out")
    if algorithm.kl.target is not None and (algorithm.kl.where == "none" or algorithm.kl.coefficient == 0):
        raise UserError("algorithm.kl.target: there is no KL term to adapt; set algorithm.kl.where, or leave it out")
    if algorithm.off_policy.weight == "mask" and algorithm.off_policy.floor > algorithm.off_policy.cap:
        raise UserError("algorithm.off_policy.floor: above cap, so that all would be masked; lower it")


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
