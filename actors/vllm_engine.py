"""vLLM's engine, as generator and evaluator use it; the only file that imports vllm when it is imported."""

import asyncio
import os
import time
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vllm is imported; its children inherit it

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from vllm import SamplingParams as VllmSampling
from vllm import TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import PrometheusStatLogger

from actors.engine import EngineOptions, EngineStats, environ, environment, sample_seed
from actors.text import completion_text, decodes_later
from actors.weight_sync import BACKEND, WORKER_EXTENSION, NcclGroup, register_with_vllm
from trainers.data import load_tokenizer
from trainers.types import DataError, Floats, Group, InfraError, Ints, Prompt, Rollout, Sampling, VersionSpan

register_with_vllm()
PROBE_PLACES = 3  # after a load: the rest of that answer, the probe's prompt and a fresh answer
CPU_BLOCK = 32  # tokens; vLLM's 128 on CPUs is longer than most prompts, and only whole blocks are shared


class WorkerExtension:
    """Named in vLLM's `worker_extension_cls`, so that the worker process imports this file and with it our engine."""


class Engine:
    """vLLM's AsyncLLM with a policy version: what generator and evaluator share.

    At most `max_num_seqs` requests are handed to vLLM at once and none while weights load, so each request is
    salted with the version whose KV blocks it may reuse. Some of these places are kept for probes: training waits
    for their answers.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.stats = EngineStats()
        self.version = -1  # nothing loaded
        self.broken: str | None = None
        self._llm: AsyncLLM | None = None
        self._tokenizer: Tokenizer | None = None  # None: vLLM decodes
        self._slots = self._probe_slots = asyncio.Semaphore(1)
        self._open = asyncio.Event()
        self._loading = asyncio.Lock()
        self._serial = 0  # a retried sample needs a fresh request id
        self._changed = 0.0  # when the engine last became busy or idle

    async def start(self) -> None:
        """Start vLLM's processes with random weights; return when they answer.

        Raises UserError if there is no tokenizer, InfraError if vLLM does not start.
        """
        arguments, counts = self._arguments(), [_scheduler_counts(self.stats)]
        tokenizer = await asyncio.to_thread(load_tokenizer, arguments.tokenizer or self.options.model_path)
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", None)
        try:
            with environ(environment(self.options, cpu=current_platform.is_cpu())):
                self._llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments, stat_loggers=counts)
        except (RuntimeError, OSError) as error:
            raise InfraError(f"vLLM did not start for {self.options.model_path}: {error}") from error
        places = self._engine.vllm_config.scheduler_config.max_num_seqs
        kept = min(PROBE_PLACES, places - 1)
        self._slots = asyncio.Semaphore(places - kept)
        self._probe_slots = asyncio.Semaphore(kept) if kept else self._slots
        self._changed = time.monotonic()
        self._open.set()

    async def generate(self, prompt: Prompt, sampling: Sampling, *, probe: bool = False) -> Group:
        """Sample one group, a request per sample; as a probe, before those that wait for a place.

        Raises DataError if the prompt leaves no room for a token, InfraError if the deadline passes or vLLM died.
        """
        if len(prompt.token_ids) >= self.options.max_length:
            raise DataError(
                f"prompt {prompt.uid} has {len(prompt.token_ids)} tokens, model.max_length is {self.options.max_length}"
            )
        self._check_ready()
        tasks = [asyncio.create_task(self._sample(prompt, sampling, index, probe)) for index in range(sampling.n)]
        if sampling.greedy:
            tasks.append(asyncio.create_task(self._greedy(prompt, sampling, probe)))
        try:
            async with asyncio.timeout(self.options.deadline_s):
                rollouts = await asyncio.gather(*tasks)
        except TimeoutError as error:
            raise InfraError(f"prompt {prompt.uid} was not answered within {self.options.deadline_s:g} s") from error
        finally:
            for task in tasks:
                task.cancel()  # vLLM aborts a request whose task is cancelled
            await asyncio.gather(*tasks, return_exceptions=True)
        self.stats.groups += 1
        return Group(prompt=prompt, rollouts=tuple(rollouts))

    async def probe(self, token_ids: Ints) -> Floats:
        """Return (L-1,) log-probs of tokens 1 … L-1 under the loaded weights, at temperature 1."""
        self._check_ready()
        sampling = VllmSampling(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        _, output = await self._request(f"probe-{self.version}", token_ids, sampling, probe=True)
        scored = zip(output.prompt_logprobs[1:], token_ids[1:].tolist(), strict=True)
        return np.array([entry[token].logprob for entry, token in scored], dtype=np.float32)

    async def load(self, version: int, path: Path) -> None:
        """Load a safetensors file and advance to `version`; an older or equal version is a no-op.

        Raises InfraError if the file is damaged: the engine goes on with the old version. After a failure inside
        vLLM the weights are undefined, so the engine refuses all further work and must be replaced.
        """
        if version <= self.version:
            return
        self._check_whole()
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InfraError(f"weights of version {version} cannot be read from {path}: {error}") from error
        await self._load(version, {"path": str(path)})

    async def across(
        self, prompt: Prompt, sampling: Sampling, load: Coroutine[Any, Any, None]
    ) -> asyncio.Task[Rollout | None]:
        """Run `load` while a probe is being answered; return the answer to come, None if it misses a version."""
        begun = asyncio.Event()
        answer = asyncio.create_task(self._spanning(prompt, sampling, begun))
        answer.add_done_callback(lambda _: begun.set())  # also if it failed
        try:
            await begun.wait()
            await load
        except BaseException:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            raise
        return answer

    async def _spanning(self, prompt: Prompt, sampling: Sampling, begun: asyncio.Event) -> Rollout | None:
        extra = {"output_kind": RequestOutputKind.CUMULATIVE, "ignore_eos": True}
        whole = replace(sampling, stop=(), extra={**sampling.extra, **extra})
        rollout = await self._sample(prompt, whole, 0, True, begun)
        return rollout if len([span for span in rollout.spans if span.stop > span.start]) > 1 else None

    async def join(self, group: NcclGroup, rank_offset: int) -> None:
        """Enter the learner's nccl group as ranks `rank_offset` … (not run yet: needs GPUs)."""
        info = asdict(group) | {"rank_offset": rank_offset, "packed": True}
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def receive(self, version: int, tensor_list: Mapping[str, Any]) -> None:
        """Load what the learner broadcasts at the same time and advance to `version` (not run yet: needs GPUs)."""
        await self._load(version, dict(tensor_list))

    async def check(self) -> None:
        """Raise InfraError if vLLM's processes are gone or its weights undefined."""
        self._check_whole()
        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            raise InfraError("vLLM's engine process died") from error

    def snapshot(self) -> EngineStats:
        """Return the statistics up to now."""
        self._count_time()
        return replace(self.stats)

    def close(self) -> None:
        """End vLLM's processes; the engine cannot be used again."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None

    @property
    def _engine(self) -> AsyncLLM:
        if self._llm is None:
            raise InfraError("the engine is not running: call start() first")
        return self._llm

    def _check_whole(self) -> None:
        if self.broken:
            raise InfraError(f"this engine must be replaced: {self.broken}")

    def _check_ready(self) -> None:
        self._check_whole()
        if self.version < 0:
            raise RuntimeError("generate was called before the first load: version 0 must be pushed first")

    async def _load(self, version: int, update: dict[str, Any]) -> None:
        async with self._loading:
            if version <= self.version:
                return
            engine, began = self._engine, time.monotonic()
            self._open.clear()
            try:
                mode = "keep" if self.options.update == "in_flight" else "wait"
                await engine.pause_generation(mode=mode, clear_cache=False)
                await engine.start_weight_update()
                self.broken = f"loading version {version} failed"  # until it has succeeded
                await engine.update_weights(WeightTransferUpdateRequest(update_info=update))
                await engine.finish_weight_update(str(version))
                self.version, self.broken = version, None
            except EngineDeadError as error:
                raise InfraError("vLLM's engine process died") from error
            finally:
                if self.broken and not engine.errored:  # nothing may be sampled from half-loaded weights
                    await engine.pause_generation(mode="abort", clear_cache=True)
                if not engine.errored:
                    await engine.resume_generation()
                self._open.set()
                self.stats.paused_s += time.monotonic() - began

    async def _sample(
        self, prompt: Prompt, sampling: Sampling, index: int, probe: bool, begun: asyncio.Event | None = None
    ) -> Rollout:
        seed = sample_seed(self.options.run, prompt.uid, index)
        uid = f"{prompt.uid}-s{index}"
        later = self._tokenizer is not None and decodes_later(sampling)
        asked = _vllm_sampling(sampling, seed, detokenize=not later)
        salt, output = await self._request(uid, prompt.token_ids, asked, probe, begun)
        completion = output.outputs[0]
        self.stats.rollouts += 1
        self.stats.prompt_tokens += len(prompt.token_ids)
        self.stats.completion_tokens += len(completion.token_ids)
        rollout = _rollout(uid, seed, salt, completion)
        if not later:
            return rollout
        ids = rollout.token_ids[: len(rollout.token_ids) - (rollout.finish_reason == "stop")]  # without what ended it
        return replace(rollout, text=completion_text(self._tokenizer, prompt.token_ids.tolist(), ids.tolist()))

    async def _greedy(self, prompt: Prompt, sampling: Sampling, probe: bool) -> Rollout:
        greedy = replace(sampling, temperature=0.0, top_p=1.0, top_k=0)
        return replace(await self._sample(prompt, greedy, sampling.n, probe), greedy=True)

    async def _request(
        self, uid: str, ids: Ints, sampling: VllmSampling, probe: bool, begun: asyncio.Event | None = None
    ) -> tuple[int, RequestOutput]:
        """Return the version whose KV blocks the request could reuse, and vLLM's final output."""
        async with self._probe_slots if probe else self._slots:
            await self._open.wait()
            version = self.version
            prompt = TokensPrompt(prompt_token_ids=ids.tolist(), cache_salt=f"version {version}")
            self._serial += 1
            self._count_time(change=1)
            try:
                async for output in self._engine.generate(prompt, sampling, f"{uid}/{self._serial}"):
                    if begun and output.outputs[0].token_ids:
                        begun.set()
                    if output.finished and output.outputs[0].finish_reason in ("stop", "length"):
                        return version, output
            except (EngineDeadError, EngineGenerateError) as error:
                raise InfraError(f"vLLM failed on {uid}: {error}") from error
            finally:
                self._count_time(change=-1)
        raise InfraError(f"vLLM aborted {uid}")

    def _count_time(self, change: int = 0) -> None:
        now = time.monotonic()
        if self.stats.in_flight:
            self.stats.busy_s += now - self._changed
        else:
            self.stats.waiting_s += now - self._changed
        self._changed = now
        self.stats.in_flight += change

    def _arguments(self) -> AsyncEngineArgs:
        options = self.options
        arguments: dict[str, Any] = {
            "model": options.model_path,
            "dtype": options.dtype,
            "max_model_len": options.max_length,
            "load_format": "dummy",  # version 0 is pushed before the first request
            "logprobs_mode": "processed_logprobs",  # of the distribution really sampled from
            "worker_extension_cls": WORKER_EXTENSION,
            "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
            "generation_config": "vllm",  # no sampling defaults from the model's directory
            "disable_log_stats": True,
        }
        if current_platform.is_cpu():
            memory = int(options.kv_cache_gb * 2**30)
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": memory, "block_size": CPU_BLOCK}
            # Never split a prompt: vLLM 0.32 then dies on CPU if the request has a seed.
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, options.max_length)}
        return AsyncEngineArgs(**(arguments | dict(options.engine)))


def _vllm_sampling(sampling: Sampling, seed: int, *, detokenize: bool) -> VllmSampling:
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": list(sampling.stop),
        "seed": seed,
        "detokenize": detokenize,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    # Of the sampled token only, whatever `extra` says: no other is kept.
    recorded = {"logprobs": 0, "flat_logprobs": True}
    return VllmSampling(**(fields | dict(sampling.extra) | recorded))


def _rollout(uid: str, seed: int, salt: int, completion: CompletionOutput) -> Rollout:
    tokens = list(completion.token_ids)
    flat: Any = completion.logprobs
    logprobs = [logprob for logprob, _ in zip(flat.logprobs, tokens, strict=True)]
    spans = [VersionSpan(start=s.start, stop=s.end, version=int(s.version)) for s in completion.weight_versions or ()]
    if spans and spans[0].version != salt:
        # Queued while weights changed: the prompt may have been read by the older version.
        spans.insert(0, VersionSpan(start=0, stop=0, version=salt))
    return Rollout(
        uid=uid,
        seed=seed,
        token_ids=np.array(tokens, dtype=np.int32),
        logprobs=np.array(logprobs, dtype=np.float32),
        spans=tuple(spans),
        finish_reason="stop" if completion.finish_reason == "stop" else "length",
        text=completion.text,
    )


def _scheduler_counts(stats: EngineStats) -> type[PrometheusStatLogger]:
    """Return a stat logger that counts preemptions; of this base class, or vLLM adds its Prometheus one."""

    class Counts(PrometheusStatLogger):
        def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
            self.engine_indexes = engine_indexes or [0]

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            if iteration_stats is not None:
                stats.preemptions += iteration_stats.num_preempted_reqs
            if scheduler_stats is not None:
                cache = scheduler_stats.prefix_cache_stats
                stats.recomputed_tokens += cache.preempted_queries - cache.preempted_hits

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return Counts
