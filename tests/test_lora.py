"""Adapters: only they are trained, and what leaves the learner is an ordinary model that says the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.errors import UserError
from configs.schema import Engine, Lora
from tests.ranks import random_batch, recipe, tiny_policy, train_and_publish
from tests.test_learner import two_ranks
from trainers.critic import Critic
from trainers.learner import Learner
from trainers.lora import add_adapters, published

LORA = {"rank": 3, "alpha": 6}
PROBE = np.array([7, 9, 4, 30, 12, 5], np.int32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_policy(tmp_path_factory.mktemp("tiny"))


def learner(path: str, **changes: Any) -> Learner:
    return Learner(recipe(path, learner={"lora": LORA, **changes}))


def plain_logprobs(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor(PROBE).long()
    with torch.no_grad():
        return model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_published_model_is_an_ordinary_one_with_the_adapters_log_probs(
    tmp_path: Path, zero: int, tied: bool
) -> None:
    path = tiny_policy(tmp_path / "start", tied=tied)
    start = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    trained = learner(path, zero=zero)
    before = trained.probe_logprobs(PROBE)
    np.testing.assert_allclose(before, plain_logprobs(AutoModelForCausalLM.from_pretrained(path)), atol=1e-5)
    for seed in range(3):
        trained.step(random_batch(seed=seed))
    after = trained.probe_logprobs(PROBE)
    assert np.abs(after - before).max() > 0.01
    trained.export(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(plain_logprobs(model), after, atol=1e-5)
    state = trained.state_dict_for_publish()
    assert state.keys() == start.keys()
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, state[name])
        adapted = name.endswith("proj.weight")
        assert torch.equal(tensor, start[name]) != adapted, name


def test_publishing_is_the_formula_and_leaves_the_training_weights_alone(path: str) -> None:
    trained = learner(path, zero=0)
    trained.step(random_batch())
    parameters = dict(trained.engine.model.module.named_parameters())
    copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    state = trained.state_dict_for_publish()
    assert all(torch.equal(parameter, copies[name]) for name, parameter in parameters.items())
    layer = "hf.model.layers.1.mlp.down_proj"
    a, b = (copies[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
    assert a.shape == (3, 64) and b.shape == (32, 3) and b.abs().max() > 0
    expected = copies[f"{layer}.base_layer.weight"] + 6 / 3 * b @ a
    torch.testing.assert_close(state[f"{layer[3:]}.weight"], expected, atol=1e-7, rtol=1e-6)
    owned = {parameter.data_ptr() for parameter in parameters.values()}
    assert all(tensor.data_ptr() not in owned for tensor in state.values())


def test_the_run_s_seed_draws_the_adapters_of_policy_and_critic(path: str) -> None:
    for section, part in (("learner", Learner), ("critic", Critic)):
        drawn = []
        for seed in (3, 3, 4):
            trained = part(recipe(path, **{section: {"lora": LORA}}, run={"name": "test", "seed": seed}))
            [layer] = [p for n, p in trained.engine.model.named_parameters() if "layers.1.mlp.up_proj.lora_A" in n]
            drawn.append(layer.detach().clone())
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_only_the_adapters_of_the_named_layers_are_trained(path: str) -> None:
    trained = learner(path, zero=0, lora={**LORA, "target_modules": ["q_proj", "v_proj"]})
    names = [name for name, p in trained.engine.model.module.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2 and all(".lora_" in name for name in names)
    assert {name.split(".")[5] for name in names} == {"q_proj", "v_proj"}
    held = sum(p.numel() for group in trained.engine.optimizer.param_groups for p in group["params"])
    assert held == 2 * (3 * (32 + 32) + 3 * (32 + 16))  # layers x (q: 32 -> 32, v: 32 -> 16)


def test_a_named_layer_that_the_model_does_not_have_is_refused(path: str) -> None:
    for name in ("query", "lm_head", "embed_tokens", "mlp"):
        with pytest.raises(UserError, match=rf"no linear layer '{name}' .* there are: down_proj, .*, v_proj$"):
            learner(path, lora={**LORA, "target_modules": ["q_proj", name]})


@pytest.mark.parametrize(("zero", "dtype"), [(0, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16")])
def test_a_loaded_learner_goes_on_bit_equal(path: str, tmp_path: Path, zero: int, dtype: str) -> None:
    sections: dict[str, Any] = {
        "learner": {"lora": LORA, "zero": zero},
        "model": {"path": path, "dtype": dtype},
        "algorithm": {"minibatches": 2},
    }
    first = Learner(recipe(path, **sections))
    first.step(random_batch(seed=1))
    first.save(tmp_path)
    expected = [first.step(random_batch(seed=seed)) for seed in (2, 3)]
    second = Learner(recipe(path, **sections))
    second.load(tmp_path)
    assert [second.step(random_batch(seed=seed)) for seed in (2, 3)] == expected
    mine, other = second.state_dict_for_publish(), first.state_dict_for_publish()
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_and_zero_stages_train_the_same_adapters(path: str, tmp_path: Path) -> None:
    settings = {"lora": LORA, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1}}
    train_and_publish(path, (("grpo", 0),), 0, 1, 0, str(tmp_path), {"token_budget": 10_000, **settings})
    two_ranks(path, tmp_path / "two", {"token_budget": 30, **settings})
    expected = torch.load(tmp_path / "grpo-zero0.pt", weights_only=False)["state"]
    for zero in (0, 2, 3):
        found = torch.load(tmp_path / "two" / f"grpo-zero{zero}.pt", weights_only=False)["state"]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=f"zero {zero} {name}: ".__add__)


def test_gradient_checkpointing_changes_nothing(path: str) -> None:
    states = []
    for on in (False, True):
        trained = learner(path, gradient_checkpointing=on)
        trained.step(random_batch())
        states.append(trained.state_dict_for_publish())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_critic_trains_its_head_in_full_and_is_written_merged(path: str, tmp_path: Path) -> None:
    config = recipe(
        path,
        algorithm={"name": "ppo", "kl": {"where": "reward", "estimator": "k1"}},
        critic={"lora": LORA, "optimizer": {"learning_rate": 1e-2}},
    )
    critic, batch = Critic(config), random_batch(seed=3)
    assert not critic.values(batch).any()
    losses = [critic.step(batch, critic.values(batch))["loss/value"] for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]
    critic.export(tmp_path)
    written = dict(AutoModelForSequenceClassification.from_pretrained(tmp_path).named_parameters())
    start = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    assert written["score.weight"].abs().max() > 0
    assert not torch.equal(written["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(written["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2"])
def test_layers_that_hold_their_weight_transposed_or_have_a_bias_merge_too(family: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2}
    changes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "gpt_neox": shape, "qwen2": shape | heads}
    config = AutoConfig.for_model(family, vocab_size=50, **changes[family])
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    adapted = AutoModelForCausalLM.from_config(config).eval()
    adapted.load_state_dict(plain.state_dict())
    add_adapters(adapted, Lora(rank=2, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    state = {one.name: one.value() for one in published(adapted)}
    assert state.keys() == dict(plain.named_parameters()).keys()
    before = plain_logprobs(plain)
    plain.load_state_dict(state, strict=False)
    assert (plain_logprobs(plain) - before).abs().max() > 0.01
    torch.testing.assert_close(plain_logprobs(plain), plain_logprobs(adapted), atol=1e-5, rtol=1e-5)


def test_a_recipe_without_adapters_is_dumped_as_before_there_were_any() -> None:
    assert "lora" not in Engine().model_dump()
    assert Engine.model_validate(Engine(lora=Lora(rank=4)).model_dump()).lora == Lora(rank=4)
