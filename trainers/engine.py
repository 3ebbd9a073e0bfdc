"""DeepSpeed: the one place that imports it."""

import fcntl
import hashlib
import logging
import math
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():  # DeepSpeed decides while it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch.utils.cpp_extension import get_default_build_root

from configs import schema
from trainers.lora import Published, add_adapters, published

deepspeed_logger.setLevel(logging.WARNING)
# Its one print says that an op was built, each time a group is joined. A build that fails raises, or prints elsewhere.
vars(sys.modules["deepspeed.comm.torch"])["print"] = logging.getLogger(__name__).debug
# DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed: a line for every one of them.
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
# torch takes it for a mistake that the schedule may move on first: see `TrainEngine.skip`.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)

TAG = "engine"
GATHER_BYTES = 2**29  # of ZeRO-3 parameters at a time
Micro = TypeVar("Micro")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """The place of this process in its torch.distributed group."""

    rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # 0: any free one, for world size 1


def join(process: Process, timeout_s: float = 600) -> None:
    """Join the process group, gloo without a GPU and nccl with one. A process can be in one group only.

    Raises RuntimeError if it is already in a group of another shape, or if the others do not come in time.
    """
    if torch.distributed.is_initialized():
        shape = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if shape != (process.rank, process.world_size):
            raise RuntimeError(f"this process is already rank {shape[0]} of {shape[1]}, not {process}")
        return
    load_ops()
    port = process.master_port or free_port()
    os.environ |= {
        "RANK": str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": process.master_addr,
        "MASTER_PORT": str(port),
    }
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s))


def load_ops() -> None:
    """Compile, once per installation, and load the C++ op that DeepSpeed's collectives use on a CPU.

    torch guards a build by the mere existence of a file: a process killed in a build, or while it loads what is built,
    leaves that file, and all later ones wait for ever. Here the kernel holds the lock, and what it finds then is stale.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    # A directory of our own: two installations that share one build over each other, and others don't hold our lock.
    ours = "headroom-" + hashlib.sha256(f"{torch.__version__} {deepspeed.__file__}".encode()).hexdigest()[:8]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    directory = root if root.name == ours else root / ours  # the parent of this process may have set it
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
    with (directory / "in_use").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in directory.glob("*/lock"):
            stale.unlink()
        builder.load()


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


def learning_rate_factor(
    step: int, schedule: Literal["constant", "linear", "cosine"], warmup: int, total: int
) -> float:
    """Return the share of the peak learning rate at optimizer step 0, 1, …: linear warm-up, then to 0 at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def deepspeed_config(config: schema.Engine, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    """Return the DeepSpeed configuration of `config`; batch sizes are 1 since we form micro-batches ourselves."""
    optimizer = config.optimizer
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": config.zero}
    if config.offload and config.zero:
        zero["offload_optimizer"] = offload
    if config.offload and config.zero == 3:
        zero["offload_param"] = offload
    if config.zero == 3:
        zero["stage3_param_persistence_threshold"] = 0 if config.offload else 100_000
    # torch's own fused AdamW: nothing to compile, on CPU or GPU.
    adam = {
        "torch_adam": True,
        "fused": True,
        "lr": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    # Many micro-batches add up in fp32; DeepSpeed can do that from stage 2 on.
    accumulate = "fp32" if config.zero >= 2 or dtype == "float32" else "bf16"
    return {
        "data_types": {"grad_accum_dtype": accumulate},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clips_itself(config, dtype) else optimizer.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def clips_itself(config: schema.Engine, dtype: Literal["float32", "bfloat16"]) -> bool:
    """Whether the gradients are ours to clip: in fp32 without ZeRO DeepSpeed would not tell the norm it clips by.

    Elsewhere it holds the gradients itself, in other precision or in parts.
    """
    return config.zero == 0 and dtype == "float32"


class TrainEngine:
    """A model under DeepSpeed on one rank.

    Its loss convention: the ranks' micro-batch losses of one step add up to the loss of the minibatch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: schema.Engine,
        *,
        dtype: Literal["float32", "bfloat16"],
        total_steps: int,
        seed: int,
        process: Process,
    ) -> None:
        """seed: of the adapters' start, where `config` has some."""
        hf: Any = model.hf  # an HF model, which nn.Module's type does not tell
        if config.lora is not None:
            add_adapters(hf, config.lora, seed)
        join(process)
        self.rank, self.world_size = process.rank, process.world_size
        self.zero = config.zero
        self._max_norm = config.optimizer.max_grad_norm if clips_itself(config, dtype) else None
        if config.gradient_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        rate = config.optimizer
        self.model, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=deepspeed_config(config, dtype),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: learning_rate_factor(step, rate.schedule, rate.warmup_steps, total_steps)
            ),
            dist_init_required=False,
        )
        if self.zero == 0 and self.world_size == 1:
            # DeepSpeed would copy all gradients into one buffer and back, to average them over one rank.
            self.model.enable_backward_allreduce = False
        self.model.train()  # there is no dropout; gradient checkpointing wants training mode
        self.device: torch.device = self.model.device

    @property
    def hf(self) -> Any:
        """The HF model inside."""
        return self.model.module.hf

    @property
    def learning_rate(self) -> float:
        """That of the next optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, micro_batches: Sequence[Micro], loss_fn: Callable[[Micro], Tensor]) -> float:
        """Take one optimizer step on the sum of all ranks' losses; return the gradient norm before clipping.

        NaN if that is not finite: the weights may be spoilt then. Every rank must bring equally many micro-batches.
        """
        for number, micro_batch in enumerate(micro_batches, start=1):
            # DeepSpeed divides by a static number of micro-batches and averages over ranks: neither is our loss.
            self.model.set_gradient_accumulation_boundary(number == len(micro_batches))
            self.model.backward(loss_fn(micro_batch) * self.world_size)
        own = self._clip()
        self.model.step()
        reported = self.model.get_global_grad_norm()
        norm = own if own is not None else math.nan if reported is None else float(reported)
        return norm if 0 <= norm < math.inf else math.nan  # -1 too: parts of DeepSpeed say that

    def skip(self, steps: int) -> None:
        """Move the learning rate's schedule on by optimizer steps that have nothing to train on."""
        with warnings.catch_warnings():  # torch takes a schedule that moves before the optimizer for a mistake
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
            for _ in range(steps):
                self.scheduler.step()

    def _clip(self) -> float | None:
        """Clip the gradients that are ours to clip, and return their norm before; None where DeepSpeed does."""
        if self._max_norm is None:
            return None
        parameters = [p for p in self.model.module.parameters() if p.grad is not None]
        return float(nn.utils.clip_grad_norm_(parameters, self._max_norm))

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over ranks, on the CPU."""
        total = tensor.detach().to(self.device, copy=True)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights under their HF names on the CPU of rank 0, tied ones once; other ranks get none.

        Adapters are merged into their weights, tensor by tensor. A collective: all ranks must call it. Parameters of
        ZeRO 3 are gathered in buckets.
        """
        state: dict[str, Tensor] = {}
        bucket: list[Published] = []
        size = 0
        weights = list(published(self.model.module))
        for place, one in enumerate(weights, start=1):
            bucket.append(one)
            size += sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in one.parameters)
            if size < GATHER_BYTES and place < len(weights):
                continue
            gathered = [parameter for part in bucket for parameter in part.parameters]
            with deepspeed.zero.GatheredParameters(gathered, enabled=self.zero == 3):
                if self.rank == 0:
                    state |= {part.name: part.value() for part in bucket}
            bucket, size = [], 0
        return state

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Write weights, optimizer, schedule, random state and `extra`; a collective."""
        self.model.save_checkpoint(str(directory), tag=TAG, client_state={"extra": dict(extra)}, save_latest=False)
        torch.save(random_state(), directory / f"random-rank{self.rank}.pt")

    def load(self, directory: Path) -> dict[str, Any]:
        """Restore what `save` wrote, on as many ranks; return `extra`. Raises FileNotFoundError if there is none."""
        path, client = self.model.load_checkpoint(str(directory), tag=TAG)
        if path is None:
            raise FileNotFoundError(f"no engine checkpoint in {directory}")
        set_random_state(torch.load(directory / f"random-rank{self.rank}.pt", weights_only=False))
        extra: dict[str, Any] = client["extra"]
        return extra


def random_state() -> dict[str, Any]:
    """Return the state of torch's, numpy's and Python's global generators."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": np.random.get_state()}
    state["python"] = random.getstate()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
