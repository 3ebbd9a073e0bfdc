"""CPU time a token of the process that talks to vLLM: text decoded by us at the end, or by vLLM as it comes.

python -m benchmarks.client [--rounds 6]
"""

import argparse
import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.engine import EngineOptions
from actors.vllm_engine import Engine
from actors.weight_sync import Mailbox, load_weights, weights_from_directory
from benchmarks.measure import environment, interleaved, interval, ratio, report
from benchmarks.recipes import command
from tests import tiny
from trainers.types import Group, Prompt, Sampling

GROUPS, N, TOKENS = 32, 8, 48
SAMPLING = Sampling(n=N, max_tokens=TOKENS, extra={"ignore_eos": True})
ARMS = {
    "at the end": SAMPLING,
    "as it comes": replace(SAMPLING, extra={"ignore_eos": True, "detokenize": True}),
}


async def measure(path: str, rounds: int) -> dict[str, Any]:
    """Return microseconds of CPU time a token and tokens/s of both arms, on one engine, A B B A.

    Raises RuntimeError if the arms do not give the same texts.
    """
    options = EngineOptions(model_path=path, run=path, dtype="float32", max_length=128, kv_cache_gb=0.5, threads=1)
    engine, mailbox = Engine(options), Mailbox(path)
    await engine.start()
    try:
        await load_weights(engine, weights_from_directory(Path(path), 0), mailbox)
        spent: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        texts: dict[str, list[str]] = {}
        for number, arm in enumerate(interleaved(list(ARMS), rounds + 1)):
            began = time.process_time(), time.perf_counter()
            groups = await asyncio.gather(*(engine.generate(prompt, ARMS[arm]) for prompt in prompts()))
            taken = time.process_time() - began[0], time.perf_counter() - began[1]
            texts[arm] = texts_of(groups)
            if number >= len(ARMS):  # the first round warms up
                spent[arm].append(taken)
    finally:
        engine.close()
        mailbox.close()
    first, second = texts.values()
    if first != second:
        raise RuntimeError("the arms gave different texts: not equal work")
    count = GROUPS * N * TOKENS
    cpu = {arm: np.array(spent[arm])[:, 0] / count * 1e6 for arm in ARMS}
    rate = {arm: count / np.array(spent[arm])[:, 1] for arm in ARMS}
    end, comes = ARMS
    return {
        **{f"{arm}: client's CPU µs a token": interval(cpu[arm]) for arm in ARMS},
        **{f"{arm}: tokens/s": interval(rate[arm]) for arm in ARMS},
        "client's CPU, at the end / as it comes": ratio(cpu[end], cpu[comes]),
        "tokens/s, at the end / as it comes": ratio(rate[end], rate[comes]),
    }


def prompts() -> list[Prompt]:
    """Return prompts of 16 random tokens: the same every time, and so are the seeds of their samples."""
    ids = np.random.default_rng(0).integers(10, 90, (GROUPS, 16)).astype(np.int32)
    return [Prompt(uid=f"p{i}", position=i, messages=(), token_ids=row) for i, row in enumerate(ids)]


def texts_of(groups: list[Group]) -> list[str]:
    """Return the texts of all completions."""
    return [rollout.text for group in groups for rollout in group.rollouts]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="measured batches of each arm: A B, B A, …")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment()
    with tempfile.TemporaryDirectory() as directory:
        tiny.tiny_model(Path(directory), max_length=128)
        results = asyncio.run(measure(directory, options.rounds))
    result = {"environment": machine, "options": {"rounds": options.rounds}, "results": results}
    report(options.out / time.strftime("client-%Y%m%d-%H%M%S") / "result.json", result)


if __name__ == "__main__":
    command(main)
