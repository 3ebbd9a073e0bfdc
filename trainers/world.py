"""The demo's world: a help desk with prompts, answers and annotators from a small grammar.

Everything is a function of its seed. What a good answer is stands in trainers.gold, which nothing here imports: the
annotators are handed each answer's gold score.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

Split = Literal["sft", "pairs", "rl", "heldout"]
SPLITS: Mapping[Split, float] = {"sft": 0.3, "pairs": 0.3, "rl": 0.3, "heldout": 0.1}

STEPS: Mapping[str, tuple[str, ...]] = {
    "password": (
        "Open our login page.",
        "Click on reset password.",
        "Check your email inbox.",
        "Choose a stronger one.",
    ),
    "delivery": ("Find the order number.", "Look up its tracking code.", "Call the local depot.", "Ask a neighbour."),
    "refund": (
        "Pack everything in its box.",
        "Print a return label.",
        "Drop off that parcel.",
        "Wait five working days.",
    ),
    "network": ("Unplug the router.", "Count to ten.", "Plug both cables back in.", "Join your home wifi."),
}
PROBLEMS: Mapping[str, tuple[str, ...]] = {
    "password": (
        "I forgot the password of my {item}.",
        "My {item} says that the password is wrong.",
        "I cannot log in to my {item}.",
    ),
    "delivery": (
        "My {item} has not arrived yet.",
        "I am still waiting for my {item}.",
        "The parcel with my {item} is late.",
    ),
    "refund": (
        "I want to return my {item}.",
        "I would like my money back for my {item}.",
        "I changed my mind about my {item}.",
    ),
    "network": (
        "My {item} cannot find the wifi.",
        "My {item} keeps losing the connection.",
        "There is no internet on my {item}.",
    ),
}
COURTESIES = (
    "Thank you for writing.",
    "We are happy to help.",
    "Sorry about this trouble.",
    "Please keep us informed.",
    "Have a nice day.",
    "You matter to us.",
)
ADJECTIVES = ("new", "old", "red", "blue", "black", "white", "small", "big", "spare", "second")
ITEMS = (
    "phone", "tablet", "laptop", "camera", "printer", "speaker", "watch", "radio", "scanner", "monitor", "console",
    "reader", "player", "projector", "recorder", "television", "thermostat", "doorbell", "keyboard", "headset",
)  # fmt: skip

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_POSITIONS = 256


class PromptRow(TypedDict):
    """One question and what it is about."""

    prompt: str
    topic: str


class DemonstrationRow(PromptRow):
    """A question with an answer as a hurried agent would write it."""

    answer: str


@cache
def _all_prompts() -> tuple[PromptRow, ...]:
    """Return every prompt of the grammar in a fixed shuffled order."""
    rows = [
        PromptRow(prompt=problem.format(item=f"{adjective} {item}"), topic=topic)
        for topic, problems in PROBLEMS.items()
        for problem, adjective, item in itertools.product(problems, ADJECTIVES, ITEMS)
    ]
    random.Random("prompts").shuffle(rows)
    return tuple(rows)


def size(split: Split) -> int:
    """Return how many prompts a split holds."""
    start, stop = _bounds(split)
    return stop - start


def _bounds(split: Split) -> tuple[int, int]:
    total, names = len(_all_prompts()), list(SPLITS)
    place = names.index(split)
    shares = [sum(list(SPLITS.values())[:end]) for end in (place, place + 1)]
    return round(total * shares[0]), round(total * shares[1])


def prompts(split: Split, n: int, seed: int) -> list[PromptRow]:
    """Return `n` different prompts of one split; no two splits share a prompt.

    Raises ValueError if the split holds fewer than n.
    """
    start, stop = _bounds(split)
    if n > stop - start:
        raise ValueError(f"split {split!r} has {stop - start} prompts, {n} were asked for")
    return random.Random(f"{split}-{seed}").sample(_all_prompts()[start:stop], n)


def demonstrations(n: int, seed: int) -> list[DemonstrationRow]:
    """Return `n` supervised examples on prompts of the split `sft`.

    Answers are honest but poor: mostly one to three steps, 15 % of them of another topic, some repeated, among up to
    three courtesies; so the policy starts far below the best answer and knows every sentence it needs.
    """
    rng = random.Random(f"demonstrations-{seed}")
    rows = prompts("sft", size("sft"), seed)
    return [DemonstrationRow(**row, answer=_draft(row["topic"], rng)) for row in rng.choices(rows, k=n)]


def _draft(topic: str, rng: random.Random) -> str:
    others = [step for name, steps in STEPS.items() if name != topic for step in steps]
    number = rng.choices((0, 1, 2, 3, 4), (1, 3, 3, 2, 1))[0]
    steps = [rng.choice(STEPS[topic] if rng.random() < 0.85 else others) for _ in range(number)]
    courtesies = [rng.choice(COURTESIES) for _ in range(rng.choices((0, 1, 2, 3), (3, 3, 2, 1))[0])]
    sentences = steps + (courtesies or ([] if steps else [rng.choice(COURTESIES)]))
    rng.shuffle(sentences)
    return " ".join(sentences)


def sentences(text: str) -> list[str]:
    """Split an answer after each full stop; a rest without one is a sentence of its own."""
    parts = [part.strip() for part in text.split(".")]
    whole = [f"{part}." for part in parts[:-1] if part]
    return whole + ([parts[-1]] if parts[-1] else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotators:
    """A pool of people who compare two answers: gold, plus biases of theirs, plus noise.

    P(first preferred) = sigmoid((utility(first) - utility(second)) / noise), the Bradley-Terry model.
    """

    length_bias: float = 0.08
    """Utility of five more words."""
    courtesy_bias: float = 0.0
    """Utility of one more courtesy."""
    noise: float = 0.3
    """Scale of the logistic noise on a difference; 0: none."""

    def utility(self, answer: str, gold: float) -> float:
        """Return what an answer of this gold score is worth to them, in units of gold."""
        courtesies = sum(sentence in COURTESIES for sentence in sentences(answer))
        return gold + self.length_bias * len(answer.split()) / 5 + self.courtesy_bias * courtesies

    def prefer_first(self, answers: tuple[str, str], golds: tuple[float, float], rng: random.Random) -> bool:
        """Draw one judgement; ties of noiseless annotators fall by a coin."""
        first, second = (self.utility(answer, gold) for answer, gold in zip(answers, golds, strict=True))
        difference = first - second
        if self.noise == 0:
            return difference > 0 or (difference == 0 and rng.random() < 0.5)
        return rng.random() < 1 / (1 + math.exp(min(-difference / self.noise, 700.0)))


def _texts() -> Iterator[str]:
    yield from (" ".join((step, step)) for steps in STEPS.values() for step in steps)
    yield from (" ".join((courtesy, courtesy)) for courtesy in COURTESIES)
    for problem in itertools.chain.from_iterable(PROBLEMS.values()):
        yield from (problem.format(item=" ".join((*ADJECTIVES, item))) for item in ITEMS)


def vocabulary() -> list[str]:
    """Return every word of the grammar as byte-level pre-tokens ("Ġ" stands for the space before), sorted."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return sorted({piece for text in _texts() for piece, _ in splitter.pre_tokenize_str(text)})


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of the grammar and bytes for everything else.

    So no text is unknown and all text survives a round trip; begin, end and padding tokens differ.
    """
    special = [PAD, BOS, EOS, *ROLES]
    pieces = sorted(set(pre_tokenizers.ByteLevel.alphabet()) | set(vocabulary()))
    vocab = {piece: index for index, piece in enumerate([*special, *pieces])}
    # Without merges a pre-token is either one whole word of the vocabulary or its bytes.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def policy_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return a Llama of about 1 million parameters; heads of 32, the smallest size vLLM has CPU kernels for."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def words(prompt: str, completion: str, row: Mapping[str, object]) -> float:
    """Return the number of words of an answer, as an evaluation's metric."""
    return float(len(completion.split()))
