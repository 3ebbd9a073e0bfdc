"""The text that we decode at the end is the text that vLLM decodes token by token."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from actors.text import completion_text, decodes_later
from tests.tiny import tiny_tokenizer
from trainers import world
from trainers.types import Sampling


def pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer as SentencePiece makes them: a space belongs to the word after it, bytes for what is rare."""
    names = ["<pad>", "<s>", "</s>", "▁", "▁a", "▁word", "s", "é", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"bytes": world.tokenizer(), "characters": tiny_tokenizer(), "pieces": pieces()}


def decoded_by_vllm(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int]) -> str:
    request: Any = SimpleNamespace(request_id="r", prompt_token_ids=prompt, sampling_params=SamplingParams())
    stream = FastIncrementalDetokenizer(tokenizer, request)
    for token in ids:
        stream.update([token], stop_terminated=False)
    return stream.get_next_output_text(finished=True, delta=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)  # of time, on a busy machine
@given(data=st.data())
def test_text_is_what_vllm_makes_of_the_same_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    prompt, completion = data.draw(ids.filter(len)), data.draw(ids)
    found = completion_text(tokenizer.backend_tokenizer, prompt, completion)
    assert found == decoded_by_vllm(tokenizer, prompt, completion)


def test_text_goes_on_after_bytes_that_no_text_can_go_on_from() -> None:
    tokenizer = TOKENIZERS["pieces"]
    names = ("▁word", "<0xC3>", "<0xB6>", "<0x80>", "s", "▁word")
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    prompt = [tokenizer.convert_tokens_to_ids("▁a")]
    text = completion_text(tokenizer.backend_tokenizer, prompt, ids)
    assert text == decoded_by_vllm(tokenizer, prompt, ids) == " wordös word"


def test_a_space_belongs_to_the_text_and_half_a_character_does_not() -> None:
    tokenizer = TOKENIZERS["pieces"]
    prompt, word, end = (tokenizer.convert_tokens_to_ids(name) for name in ("▁a", "▁word", "</s>"))
    half, rest = (tokenizer.convert_tokens_to_ids(name) for name in ("<0xC3>", "<0xB6>"))
    backend = tokenizer.backend_tokenizer
    assert completion_text(backend, [prompt], [word, half, rest, end]) == " wordö"
    assert completion_text(backend, [prompt], [word, half]) == " word"
    assert completion_text(backend, [prompt], []) == ""


@pytest.mark.parametrize(
    ("changes", "later"),
    [
        ({}, True),
        ({"extra": {"ignore_eos": True}}, True),
        ({"stop": ("END",)}, False),
        ({"extra": {"skip_special_tokens": False}}, False),
        ({"extra": {"bad_words": ["no"]}}, False),
    ],
)
def test_vllm_decodes_where_something_hangs_on_the_text(changes: dict[str, Any], later: bool) -> None:
    assert decodes_later(Sampling(n=1, max_tokens=4, **changes)) is later
