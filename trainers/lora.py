"""Low-rank adapters instead of all weights: peft puts them into a model, and what leaves the learner is merged.

Hu et al. 2021 (LoRA), section 4.1: a linear layer W becomes W + alpha / rank · B A, of which only A and B are trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from configs import schema
from configs.errors import UserError

ADAPTER = "default"  # peft's own name for the only one


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A weight as it leaves the learner, and what it is computed from."""

    name: str  # HF's, without `hf.`
    weight: nn.Parameter
    layer: Any = None  # peft's, if this weight has an adapter

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that `value` reads: what ZeRO 3 has to gather."""
        pair = [] if self.layer is None else [self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight]
        return [self.weight, *pair]

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the weight on the CPU in memory of its own, its adapter merged into it; in place nothing changes."""
        if self.layer is None:
            return self.weight.detach().to("cpu", copy=True)
        merged: Tensor = self.weight.detach().float() + self.layer.get_delta_weight(ADAPTER).float()
        return merged.to("cpu", self.weight.dtype)


def add_adapters(hf: Any, lora: schema.Lora, seed: int) -> None:
    """Put adapters into the linear layers of `hf`, in place, and freeze all else but the head of a classifier.

    B starts at 0, so they change nothing yet; A is drawn with `seed`, which is to be the same on all ranks. Raises
    UserError for target modules that the model does not have.
    """
    import peft  # noqa: PLC0415  # slow to import, and few runs need it

    linear = {name: m for name, m in hf.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    known = sorted({name.rpartition(".")[2] for name in linear})
    wanted = lora.target_modules or known
    if strange := [name for name in wanted if name not in known]:
        raise UserError(
            f"lora.target_modules: the {hf.config.model_type} model has no linear layer {strange[0]!r} below its head; "
            f"there are: {', '.join(known)}"
        )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=[name for name in linear if name.rpartition(".")[2] in wanted],
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in linear.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # ZeRO 3 takes each rank's part of A from that rank: alike on all
        peft.inject_adapter_in_model(config, hf.base_model)
    if (head := hf.get_output_embeddings()) is not None:
        head.requires_grad_(False)


def published(module: nn.Module) -> Iterator[Published]:
    """Yield the weights of the model in `module`, tied ones once, under the names they have without adapters."""
    adapted: list[Any] = [layer for layer in module.modules() if hasattr(layer, "get_delta_weight")]
    layers = {id(layer.base_layer.weight): layer for layer in adapted}
    for name, parameter in module.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        plain = name.removeprefix("hf.").replace(".base_layer.", ".")
        yield Published(name=plain, weight=parameter, layer=layers.get(id(parameter)))
