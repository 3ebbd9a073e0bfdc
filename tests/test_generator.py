"""The engine and weight sync against Hugging Face, on a real vLLM."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from transformers import LlamaForCausalLM

from actors.engine import EngineOptions, sample_seed
from actors.vllm_engine import PROBE_PLACES, Engine
from actors.weight_sync import Mailbox, choose_transport, load_weights, pack, weights_from_directory
from tests.tiny import tiny_model
from trainers.types import DataError, Floats, Group, InfraError, Ints, Prompt, Rollout, Sampling, VersionSpan, Weights

MAX_LENGTH = 1024
PROBE = np.array([3, 40, 15, 80, 101, 31, 21, 2, 4] * 40, dtype=np.int32)  # longer than two KV blocks
LONG = Sampling(n=4, max_tokens=600, extra={"ignore_eos": True})


@dataclass
class Served:
    """One engine with its loop, and the Hugging Face twin of the version it serves."""

    engine: Engine
    runner: asyncio.Runner
    mailbox: Mailbox
    directory: Path
    tied: bool
    model: LlamaForCausalLM | None = None

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def next_weights(self) -> tuple[LlamaForCausalLM, Weights]:
        version = self.engine.version + 1
        model = tiny_model(self.directory / "next", tied=self.tied, seed=version + 1, max_length=MAX_LENGTH)
        buffer, sha256 = pack(model.state_dict())
        return model, Weights(version=version, hash=sha256, handle=buffer)

    def push(self) -> None:
        self.model, weights = self.next_weights()
        self.run(load_weights(self.engine, weights, self.mailbox))


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tied = request.param
    directory = tmp_path_factory.mktemp("tied" if tied else "untied")
    tiny_model(directory, tied=tied, max_length=MAX_LENGTH)
    options = EngineOptions(
        model_path=str(directory), run=str(directory), dtype="float32", max_length=MAX_LENGTH, kv_cache_gb=0.1,
        threads=1, engine={"max_num_seqs": 64},
    )  # fmt: skip
    with asyncio.Runner() as runner:
        served = Served(Engine(options), runner, Mailbox(options.run), directory, tied)
        served.run(served.engine.start())
        served.push()
        yield served
        served.engine.close()
        served.mailbox.close()


both = pytest.mark.parametrize("served", [True, False], ids=["tied", "untied"], indirect=True)
tied = pytest.mark.parametrize("served", [True], ids=["tied"], indirect=True)
untied = pytest.mark.parametrize("served", [False], ids=["untied"], indirect=True)


def prompt(uid: str = "e0-p0", ids: Ints = PROBE) -> Prompt:
    return Prompt(uid=uid, position=0, messages=(), token_ids=ids)


def hf_logprobs(model: LlamaForCausalLM, ids: Ints, temperature: float = 1.0) -> Floats:
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        logprobs = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
    return logprobs[:-1].gather(1, tokens[1:, None])[:, 0].numpy()


def decoded_gap(served: Served, group: Group, temperature: float) -> float:
    gaps = []
    for rollout in group.rollouts:
        ids = np.concatenate([group.prompt.token_ids, rollout.token_ids])
        expected = hf_logprobs(served.model, ids, temperature)[len(group.prompt.token_ids) - 1 :]
        gaps.append(np.abs(expected - rollout.logprobs).max())
    return max(gaps)


@pytest.mark.slow
@tied
def test_many_long_prompts_at_once(served: Served) -> None:
    async def all_groups() -> list[Group]:
        sampling = Sampling(n=2, max_tokens=4)
        asked = [prompt(f"e0-p{i}", np.roll(np.resize(PROBE, 200), i)) for i in range(16)]
        return await asyncio.gather(*(served.engine.generate(one, sampling) for one in asked))

    groups = served.run(all_groups())  # 3,200 prompt tokens: more than vLLM takes in one step
    assert max(decoded_gap(served, group, 1.0) for group in groups) < 1e-4


@pytest.mark.slow
@both
def test_engine_matches_the_learner_after_every_push(served: Served) -> None:
    for _ in range(2):
        before = hf_logprobs(served.model, PROBE)
        served.run(served.engine.generate(prompt(), Sampling(n=1, max_tokens=2)))  # leaves KV blocks of this version
        served.push()
        expected = hf_logprobs(served.model, PROBE)
        assert np.abs(expected - before).max() > 1  # the push changed something to be found
        assert np.abs(served.run(served.engine.probe(PROBE)) - expected).max() < 1e-4
        group = served.run(served.engine.generate(prompt(), Sampling(n=4, max_tokens=24, temperature=0.7)))
        assert decoded_gap(served, group, 0.7) < 1e-4
        for rollout in group.rollouts:
            assert rollout.spans == (VersionSpan(start=0, stop=len(rollout.token_ids), version=served.engine.version),)


@pytest.mark.slow
@tied
def test_in_flight_update_is_recorded_in_the_spans(served: Served) -> None:
    old, model = served.engine.version, served.model
    following, weights = served.next_weights()

    async def race() -> Group:
        group = asyncio.create_task(served.engine.generate(prompt(), LONG))
        await asyncio.sleep(0.3)
        await load_weights(served.engine, weights, served.mailbox)
        return await group

    for rollout in served.run(race()).rollouts:
        first, second = rollout.spans
        assert (first.start, first.version, second.version) == (0, old, old + 1)
        assert 0 < first.stop == second.start < second.stop == len(rollout.token_ids) == LONG.max_tokens
        assert rollout.oldest_version == old
        ids = np.concatenate([PROBE, rollout.token_ids[: first.stop]])
        assert np.abs(hf_logprobs(model, ids)[len(PROBE) - 1 :] - rollout.logprobs[: first.stop]).max() < 1e-4
    served.model = following


@pytest.mark.slow
@tied
def test_a_probe_across_a_load_spans_both_versions(served: Served) -> None:
    old = served.engine.version
    following, weights = served.next_weights()
    load = load_weights(served.engine, weights, served.mailbox)

    async def answered() -> Rollout | None:
        return await (await served.engine.across(prompt(ids=PROBE[:8]), Sampling(n=1, max_tokens=200), load))

    rollout = served.run(answered())
    assert rollout is not None
    first, second = rollout.spans
    assert (first.version, second.version) == (old, old + 1)
    assert 0 < first.stop == second.start < second.stop == 200
    served.model = following


@pytest.mark.slow
@tied
def test_drain_finishes_running_requests_and_holds_new_ones(served: Served) -> None:
    old, options = served.engine.version, served.engine.options
    served.engine.options = replace(options, update="drain")
    following, weights = served.next_weights()

    async def race() -> tuple[Group, Group]:
        running = asyncio.create_task(served.engine.generate(prompt("running"), LONG))
        await asyncio.sleep(0.3)
        loading = asyncio.create_task(load_weights(served.engine, weights, served.mailbox))
        await asyncio.sleep(0.1)
        assert not loading.done()
        held = await served.engine.generate(prompt("held"), Sampling(n=1, max_tokens=2))
        await loading
        return await running, held

    running, held = served.run(race())
    served.engine.options, served.model = options, following
    assert {span.version for rollout in running.rollouts for span in rollout.spans} == {old}
    assert [span.version for span in held.rollouts[0].spans] == [old + 1]


@pytest.mark.slow
@tied
def test_a_version_advances_only_after_success(served: Served, tmp_path: Path) -> None:
    engine, version = served.engine, served.engine.version
    before = served.run(engine.probe(PROBE))
    _, weights = served.next_weights()
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(weights.handle.tobytes()[:-100])
    with pytest.raises(InfraError, match="cannot be read"):
        served.run(engine.load(version + 1, torn))
    flipped = weights.handle.copy()
    flipped[-1] ^= 1
    with pytest.raises(InfraError, match="damaged"):
        served.run(load_weights(engine, replace(weights, handle=flipped), served.mailbox))
    served.run(load_weights(engine, replace(weights, version=version), served.mailbox))  # not newer: nothing happens
    assert engine.version == version
    np.testing.assert_array_equal(served.run(engine.probe(PROBE)), before)


@pytest.mark.slow
@tied
def test_a_deadline_aborts_and_the_engine_goes_on(served: Served) -> None:
    options = served.engine.options
    served.engine.options = replace(options, deadline_s=0.2)
    with pytest.raises(InfraError, match="0.2 s"):
        served.run(served.engine.generate(prompt(), LONG))
    served.engine.options = options
    group = served.run(served.engine.generate(prompt(), Sampling(n=2, max_tokens=8)))
    assert decoded_gap(served, group, 1.0) < 1e-4
    assert served.engine.snapshot().in_flight == 0


@pytest.mark.slow
@tied
def test_a_probe_does_not_wait_for_a_place(served: Served) -> None:
    places = served.engine.options.engine["max_num_seqs"] - PROBE_PLACES

    async def race() -> tuple[bool, int]:
        many = replace(LONG, n=2 * places)
        group = asyncio.create_task(served.engine.generate(prompt(ids=PROBE[:8]), many))
        while served.engine.stats.in_flight < places:
            await asyncio.sleep(0.01)
        await served.engine.probe(PROBE[:8])
        await served.engine.generate(prompt("probe", PROBE[:8]), Sampling(n=1, max_tokens=2), probe=True)
        state = group.done(), served.engine.stats.in_flight
        group.cancel()
        await asyncio.wait((group,))
        return state

    assert served.run(race()) == (False, places)


@pytest.mark.slow
@tied
def test_sampling_is_reproducible_stops_and_refuses(served: Served) -> None:
    sampling = Sampling(n=4, max_tokens=16, extra={"ignore_eos": True, "min_tokens": 0})
    first, again, other = (
        served.run(served.engine.generate(prompt(uid), sampling)) for uid in ("e0-p1", "e0-p1", "e0-p2")
    )
    tokens = [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len({tuple(ids) for ids in tokens[0] + tokens[2]}) == 8

    text = first.rollouts[0].text
    stop = next(c for c in text[2:] if c not in text[:2])
    stopped = served.run(served.engine.generate(prompt("e0-p1"), replace(sampling, stop=(stop,)))).rollouts[0]
    kept = text.index(stop)
    assert (stopped.text, stopped.finish_reason) == (text[:kept], "stop")
    assert stopped.token_ids.tolist() == tokens[0][0][: len(stopped.token_ids)]
    assert len(stopped.logprobs) == len(stopped.token_ids) == stopped.spans[-1].stop

    last = tokens[0][0][3]  # a token that ends a completion is not in its text, whoever decodes it
    by_token = replace(sampling, extra={**sampling.extra, "stop_token_ids": [last]})
    by_vllm = replace(by_token, extra={**by_token.extra, "detokenize": True})
    ours, theirs = (served.run(served.engine.generate(prompt("e0-p1"), of)).rollouts for of in (by_token, by_vllm))
    assert ours[0].finish_reason == "stop" and len(ours[0].text) == tokens[0][0].index(last)
    assert [rollout.text for rollout in ours] == [rollout.text for rollout in theirs]
    with pytest.raises(DataError, match="1024 tokens"):
        served.run(served.engine.generate(prompt("long", np.full(1024, 9, dtype=np.int32)), sampling))


@pytest.mark.slow
@tied
def test_half_loaded_weights_are_never_sampled_from(served: Served, tmp_path: Path) -> None:
    state = served.next_weights()[0].state_dict()
    wrong = {name: tensor[:3] for name, tensor in state.items()}
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(pack(wrong)[0].tobytes())
    version = served.engine.version
    with pytest.raises(Exception, match="collective_rpc"):
        served.run(served.engine.load(version + 1, path))
    assert served.engine.version == version
    for refused in (served.engine.generate(prompt(), Sampling(n=1, max_tokens=2)), served.engine.check()):
        with pytest.raises(InfraError, match="must be replaced"):
            served.run(refused)


@pytest.mark.slow
@untied
def test_a_dead_engine_is_an_infra_error(served: Served) -> None:
    async def kill() -> None:
        group = asyncio.create_task(served.engine.generate(prompt(), LONG))
        await asyncio.sleep(0.2)
        for child in multiprocessing.active_children():
            if "EngineCore" in child.name:
                os.kill(child.pid, signal.SIGKILL)
        await group

    with pytest.raises(InfraError):
        served.run(kill())
    with pytest.raises(InfraError):
        served.run(served.engine.check())


def test_seeds_are_stable_and_distinct() -> None:
    seeds = {sample_seed("run", f"e0-p{position}", sample) for position in range(200) for sample in range(8)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed("run", "e0-p17", 3) == sample_seed("run", "e0-p17", 3) != sample_seed("other", "e0-p17", 3)


def test_packed_weights_are_a_safetensors_file() -> None:
    tied = torch.randn(5, 3)
    state = {"a.weight": torch.randn(3, 4).t(), "b": torch.arange(3).to(torch.bfloat16), "embed": tied, "lm_head": tied}
    buffer, sha256 = pack(state)
    read = load(buffer.tobytes())
    assert set(read) == {"a.weight", "b", "embed"}
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in read)
    assert pack(dict(reversed(state.items())))[1] == sha256
    assert pack({**state, "b": state["b"] + 1})[1] != sha256


def test_an_exported_policy_is_packed_as_the_learner_packs_it(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, tied=True)
    weights = weights_from_directory(tmp_path, 7)
    assert (weights.version, weights.hash) == (7, pack(model.state_dict())[1])


def test_mailbox_holds_one_copy_per_node(tmp_path: Path) -> None:
    first, second = Mailbox(str(tmp_path)), Mailbox(str(tmp_path))
    buffer, sha256 = pack({"w": torch.ones(4)})
    path = first.put(3, buffer, sha256)
    written = path.stat().st_mtime_ns
    assert second.find(3, sha256) == second.put(3, buffer, sha256) == path and path.stat().st_mtime_ns == written
    assert second.find(3, "0" * 64) is None  # same version, other tensors: a run that was rolled back
    newer = second.put(4, *pack({"w": torch.zeros(4)}))
    second.remove_older(4)
    assert not path.exists() and newer.exists()
    first.close()
    assert newer.exists()
    second.close()
    assert not newer.parent.exists()


def test_auto_takes_nccl_only_between_gpus() -> None:
    choices = {(a, b): choose_transport("auto", learner_gpus=a, generator_gpus=b) for a in (0, 1) for b in (0, 1)}
    assert choices == {(0, 0): "object_store", (0, 1): "object_store", (1, 0): "object_store", (1, 1): "nccl"}
    assert choose_transport("object_store", learner_gpus=1, generator_gpus=1) == "object_store"
