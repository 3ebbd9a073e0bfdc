"""A character tokenizer and random models, small enough to build in a test."""

from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def tokenizer(*, chat: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character."""
    names = ["<pad>", "<unk>", "<s>", "</s>", *CHARACTERS]
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT if chat else None,
        padding_side=padding_side,
    )


def llama(**changes: Any) -> LlamaConfig:
    """Configure a Llama of two layers and a few thousand parameters; the pad token is 0."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return LlamaConfig(**(shape | heads | tokens | changes))


def reward_model(path: Path, *, chat: bool = False, padding_side: str = "right", num_labels: int = 1) -> str:
    """Write a random reward model with its tokenizer."""
    torch.manual_seed(0)
    LlamaForSequenceClassification(llama(num_labels=num_labels)).save_pretrained(path)
    tokenizer(chat=chat, padding_side=padding_side).save_pretrained(path)
    return str(path)


def encoder_reward_model(path: Path, *, chat: bool = False, padding_side: str = "right") -> str:
    """Write a random reward model that reads in both directions; it pads with another token than the tokenizer."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=128, **size, num_labels=1, pad_token_id=1, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(path)
    tokenizer(chat=chat, padding_side=padding_side).save_pretrained(path)
    return str(path)


def policy(path: Path, **changes: Any) -> str:
    """Write a random policy with its tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(llama(**changes)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


# A policy whose next-token distribution is far from uniform, tied or untied: for engine parity.
SPECIALS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per ASCII character, the six specials first."""
    alphabet = (*SPECIALS, "<unk>", *(ascii_letters + digits + punctuation + " \n"))
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIALS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    directory: Path, *, tied: bool = True, seed: int = 0, scale: float = 12.0, max_length: int = 256
) -> LlamaForCausalLM:
    """Write a random model and its tokenizer to `directory` and return the model (float32, eval).

    `scale` spreads the weights so that the next-token distribution is far from uniform and differs by seed.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "tie_word_embeddings": tied}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(llama(**shape, **tokens, max_position_embeddings=max_length)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def load_tiny(directory: Path) -> LlamaForCausalLM:
    """Load what `tiny_model` wrote."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
