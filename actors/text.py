"""The text of a completion, decoded once when it is whole.

vLLM would decode each token twice as it comes, for streams and for the names of its log-probs: a third of the client's
time with a small policy (docs/performance.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from trainers.types import Sampling

# Of vLLM's SamplingParams: where one of them is given, vLLM looks at the text itself, or another text is asked for.
TEXTUAL = (
    "stop",
    "bad_words",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


def decodes_later(sampling: Sampling) -> bool:
    """Whether vLLM can leave the text to us: nothing that ends a completion, or is asked of it, stands in its text."""
    extra: Mapping[str, Any] = sampling.extra
    return not sampling.stop and not any(name in extra for name in TEXTUAL)


def completion_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Return the text of `token_ids` as it goes on after the prompt's, without special tokens.

    Token by token, as vLLM has it: whether a word begins with a space is decided by what stands before it, bytes that
    make no whole character at the end are left out, and where no text can go on from a byte, it begins anew.
    """
    stream, parts = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True), []
    for token in token_ids:
        try:
            parts.append(stream.step(tokenizer, token))
        except Exception as error:  # tokenizers has no kind of its own for bytes that no text can go on from
            if not str(error).startswith("Invalid prefix"):
                raise
            stream = DecodeStream(skip_special_tokens=True)
            parts.append(stream.step(tokenizer, token))
    return "".join(part for part in parts if part)
