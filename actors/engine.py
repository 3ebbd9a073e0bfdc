"""What a vLLM engine is started with, what it counts, and how its samples are seeded; vllm itself is not needed."""

import hashlib
import os
import select
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from configs.schema import SamplingParams
from trainers.types import Sampling

OWNER = "HEADROOM_ENGINE_OWNER"  # environment of vLLM's processes: the process that started them


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine is started with."""

    model_path: str
    run: str  # salts the seeds and names the shared-memory files
    dtype: str = "bfloat16"
    max_length: int = 1024  # prompt and completion tokens
    update: Literal["in_flight", "drain"] = "in_flight"
    deadline_s: float = 300.0  # of one group, queueing included
    kv_cache_gb: float = 1.0  # CPU engines
    threads: int | None = None  # of the vLLM worker, CPU engines
    cores: tuple[int, ...] = ()  # pin the worker to them, CPU engines
    engine: Mapping[str, Any] = field(default_factory=dict)  # further AsyncEngineArgs


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counted since the start of the engine."""

    groups: int = 0
    rollouts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0  # prefilled again after a preemption
    busy_s: float = 0.0  # at least one request was in the engine
    waiting_s: float = 0.0  # none was
    paused_s: float = 0.0  # loading weights
    in_flight: int = 0


def environment(options: EngineOptions, *, cpu: bool) -> dict[str, str]:
    """Return what vLLM's processes, children of the one that starts them, read from their environment."""
    variables = {OWNER: str(os.getpid())}
    if not cpu:
        return variables
    binding = ",".join(map(str, options.cores)) or "nobind"
    variables |= {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_OMP_THREADS_BIND": binding}  # CI_ENV: no warm-up
    if options.engine.get("enforce_eager", True):
        variables["TORCHDYNAMO_DISABLE"] = "1"  # else the first log-prob waits 12 s for a compiler
    if options.threads:
        variables["OMP_NUM_THREADS"] = str(options.threads)
    if not options.cores:
        # The model runs in EngineCore, as on one GPU: a process less to start, hold and talk to. On CPUs vLLM wants a
        # worker process to set its threads in, unless this variable, meant for offline use, is 0.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return variables


@contextmanager
def environ(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for as long as its children start."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


def sample_seed(run: str, uid: str, sample: int) -> int:
    """Return the 31-bit seed of one sample: a hash, so that neighbouring prompts share no seeds."""
    digest = hashlib.sha256(f"{run}\0{uid}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def sampling_of(params: SamplingParams, *, greedy: bool = False) -> Sampling:
    """Turn the config section into the message; greedy: with the greedy completion of each prompt besides."""
    return Sampling(
        n=params.n,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        stop=tuple(params.stop),
        greedy=greedy,
        extra=params.extra,
    )


def shortened(sampling: Sampling, tokens: int) -> Sampling:
    """Return the sampling of a probe: one completion of at most `tokens`, whatever least length the recipe asks for."""
    extra = {key: value for key, value in sampling.extra.items() if key != "min_tokens"}
    return replace(sampling, n=1, max_tokens=min(tokens, sampling.max_tokens), greedy=False, extra=extra)


def end_with_owner() -> None:
    """Run in a vLLM worker: end it and its EngineCore as soon as the process that started them is gone.

    An actor that was killed cannot close its engine, and EngineCore does not look: it would wait for ever and keep
    its memory. A worker that vLLM did not start as a child of that process (its Ray executor's) is left to Ray.
    """
    if owner := int(os.environ.get(OWNER, 0)):
        threading.Thread(target=_wait_and_end, args=(owner, os.getppid()), name="owner", daemon=True).start()


def _wait_and_end(owner: int, parent: int) -> None:
    try:
        select.select([os.pidfd_open(owner)], [], [])
    except ProcessLookupError:
        pass  # gone already
    if parent != owner and os.getppid() == parent:  # else this is EngineCore itself, or an orphan of it
        os.kill(parent, signal.SIGKILL)
    os._exit(1)
