"""The networks: HF models wrapped to return exactly what a loss needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from trainers.layout import Sequences, sequences
from trainers.microbatch import bundle, plan
from trainers.types import Floats, Ints

DType = Literal["float32", "bfloat16"]
LOGITS_PER_CHUNK = 2**24  # 64 MB of fp32 logits at a time
LOGITS_KEPT = 2**26  # 256 MB


class PolicyModel(nn.Module):
    """An HF causal language model that returns log-probs of completion tokens only."""

    def __init__(self, hf: Any, *, logits_per_chunk: int = LOGITS_PER_CHUNK, logits_kept: int = LOGITS_KEPT) -> None:
        super().__init__()
        self.hf = hf
        self.logits_per_chunk, self.logits_kept = logits_per_chunk, logits_kept

    def forward(
        self, batch: Sequences, temperature: float = 1.0, *, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies, both (b, T), in nats of softmax(logits / temperature).

        Entropies have a gradient only if it is asked for. 0 outside the mask. Logits exist for a chunk of tokens at a
        time. What the backward pass needs of them is kept for the first tokens, up to `logits_kept` numbers, and
        computed again for the others: at most 4 bytes x (logits_kept + 4 logits_per_chunk) exist at once beside the
        hidden states and the gradient of the head (tests/test_memory.py); more in models that cap their
        logits, and for the gradient of entropies.
        """
        states = _states(self.hf, batch)
        # One index for each token: gradients are added up much faster than by pairs of indices.
        places = (batch.rows[:, None] * states.shape[1] + batch.positions)[batch.mask]
        hidden = states.flatten(0, 1).index_select(0, places)
        wanted = batch.targets[batch.mask]
        vocabulary = self.hf.config.get_text_config().vocab_size
        size, kept = max(1, self.logits_per_chunk // vocabulary), self.logits_kept // vocabulary
        parts = []
        for start in range(0, max(len(hidden), 1), size):  # once even if all completions are empty
            chunk = (hidden[start : start + size], wanted[start : start + size], temperature, entropy_gradient)
            if torch.is_grad_enabled() and start + len(chunk[0]) > kept:
                parts.append(checkpoint(self._score, *chunk, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._score(*chunk))
        logprobs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        zeros = torch.zeros(batch.mask.shape, dtype=torch.float32, device=states.device)
        return zeros.masked_scatter(batch.mask, logprobs), zeros.masked_scatter(batch.mask, entropies)

    def _score(
        self, hidden: Tensor, targets: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        # The head is not called: ZeRO 3 wants the same calls of modules on all ranks, which differ in their chunks.
        head = self.hf.lm_head
        # One name for logits and log-probs, so that the former are freed before more is made.
        scores = _finish(nn.functional.linear(hidden, head.weight, head.bias).float(), self.hf.config.get_text_config())
        if temperature != 1.0:  # spares a pass over the vocabulary
            scores = scores / temperature
        scores = scores.log_softmax(-1)
        chosen = scores.gather(-1, targets[:, None])[:, 0]  # a recomputation without entropies ends here
        if entropy_gradient:
            return chosen, -(scores.exp() * scores).sum(-1)
        with torch.no_grad():
            return chosen, -scores.exp().mul_(scores).sum(-1)


class ValueModel(nn.Module):
    """An HF sequence-classification model with one output, read at every completion token."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, batch: Sequences) -> Tensor:
        """Return the value (b, T) of the state before each completion token, 0 outside the mask."""
        states = _states(self.hf, batch)
        hidden = states[batch.rows[:, None], batch.positions]
        return torch.where(batch.mask, self.hf.score(hidden)[..., 0].float(), 0.0)


class ScoreModel(nn.Module):
    """An HF sequence-classification model with one output, read at the last token of each sequence."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, batch: Sequences) -> Tensor:
        """Return one score per sequence (b,)."""
        states = _states(self.hf, batch)
        scores: Tensor = self.hf.score(states[batch.rows, batch.last])
        return scores[:, 0].float()


def load_policy(path: str | Path, dtype: DType) -> PolicyModel:
    """Load a causal language model in HF format, without dropout: old and new log-probs must be of one function."""
    config = _without_dropout(AutoConfig.from_pretrained(path))
    return PolicyModel(AutoModelForCausalLM.from_pretrained(path, config=config, dtype=getattr(torch, dtype)))


def load_sequence_classifier(path: str | Path, dtype: DType, *, head: Literal["zero", "random"] = "zero") -> Any:
    """Load an HF sequence-classification model with one output.

    From a causal language model its transformer is taken, with a new head: at zero, so that every value is 0, or
    random, so that the transformer learns from the first step (Stiennon et al. 2020: variance 1 / (hidden + 1)).
    """
    config = _without_dropout(AutoConfig.from_pretrained(path, num_labels=1))
    fresh = not any("SequenceClassification" in name for name in config.architectures or ())
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # a missing score head is what is asked for, not a warning
    try:
        hf = AutoModelForSequenceClassification.from_pretrained(path, config=config, dtype=getattr(torch, dtype))
    finally:
        hf_logging.set_verbosity(verbosity)
    if fresh:
        nn.init.normal_(hf.score.weight, std=0.0 if head == "zero" else (hf.score.in_features + 1) ** -0.5)
    return hf


def export(hf: Any, state: dict[str, Tensor], directory: str | Path, tokenizer_from: str | Path) -> None:
    """Write the weights `state` (HF names) as an HF model directory, with the tokenizer of its start weights."""
    hf.save_pretrained(directory, state_dict=state)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(directory)


@torch.no_grad()
def completion_logprobs(
    model: nn.Module,
    prompt_ids: Sequence[Ints],
    completion_ids: Sequence[Ints],
    temperature: float,
    token_budget: int,
    *,
    width: int | None = None,
) -> list[Floats]:
    """Return the log-probs (T_i,) of each completion under a PolicyModel, or an engine around one.

    token_budget in padded tokens of one forward pass; width as `layout.tree_width` gives it: prompts are shared.
    """
    device = next(model.parameters()).device
    lengths = [len(completion) for completion in completion_ids]
    result: list[Floats] = [np.zeros(0, np.float32)] * len(lengths)
    bundles = bundle(range(len(lengths)), prompt_ids, lengths, token_budget, width=width)
    for micro in plan(bundles, token_budget)[0]:
        rows = micro.rows
        batch = sequences(
            [prompt_ids[i] for i in rows], [completion_ids[i] for i in rows], device, bundles=micro.bundles
        )
        logprobs, _ = model(batch, temperature=temperature)
        for row, values in zip(rows, logprobs.cpu().numpy(), strict=True):
            result[row] = values[: len(completion_ids[row])]
    return result


def _states(hf: Any, batch: Sequences) -> Tensor:
    output = hf.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state
    return states


def _finish(logits: Tensor, config: Any) -> Tensor:
    """Apply what some families (Gemma 2, Cohere, Granite) do between lm_head and softmax."""
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _without_dropout(config: Any) -> Any:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config
