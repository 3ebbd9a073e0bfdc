"""TRL's GRPOTrainer with HF generate, on the prompts and settings of a Headroom run. Runs in TRL's own environment.

python benchmarks/trl_arm.py OUT SPEC     SPEC is the JSON that benchmarks.compare_trl writes
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))


class Clock(transformers.TrainerCallback):
    """Notes when each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.time())


def main(out: str, spec: dict[str, Any]) -> None:
    """Train and write when the steps ended, the versions, and the lengths that TRL really trained on."""
    torch.set_num_threads(spec["threads"])
    module, name = spec["reward"].split(":")
    rule = getattr(importlib.import_module(module), name)

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        return [rule(p[-1]["content"], c[0]["content"], {}) for p, c in zip(prompts, completions, strict=True)]

    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=spec["model"],
        reward_funcs=reward,
        args=config(spec),
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in spec["prompts"]]),
        processing_class=transformers.AutoTokenizer.from_pretrained(spec["model"], padding_side="left"),
        callbacks=[clock],
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    models = [trainer.model] + ([trainer.ref_model] if trainer.ref_model is not None else [])
    found = {
        "ends": clock.ends,
        "lengths": [entry["completions/mean_length"] for entry in logged],
        "num_tokens": logged[-1]["num_tokens"],  # prompts and completions, counted by TRL
        "kl": [entry.get("kl") for entry in logged],
        "reference": trainer.ref_model is not None,
        "dtypes": sorted({str(p.dtype) for model in models for p in model.parameters()}),
        "threads": torch.get_num_threads(),
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    Path(out).write_text(json.dumps(found))


def config(spec: dict[str, Any]) -> trl.GRPOConfig:
    """Translate the spec; everything not named is off or TRL's default."""
    return trl.GRPOConfig(
        output_dir=spec["dir"],
        use_cpu=True,
        bf16=False,  # no autocast: the weights themselves have the run's dtype
        model_init_kwargs={"dtype": spec["dtype"]},
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["samples"] // spec["accumulation"],
        gradient_accumulation_steps=spec["accumulation"],
        num_generations=spec["n"],
        max_completion_length=spec["tokens"],
        generation_kwargs={"min_new_tokens": spec["tokens"]},
        temperature=spec["temperature"],
        top_p=spec["top_p"],
        top_k=spec["top_k"],
        beta=spec["kl"],
        epsilon=spec["clip"][0],
        epsilon_high=spec["clip"][1],
        loss_type="dapo",  # one mean over all tokens of the batch, as aggregate: token
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=spec["betas"][0],
        adam_beta2=spec["betas"][1],
        weight_decay=spec["weight_decay"],
        max_grad_norm=spec["max_grad_norm"],
        gradient_checkpointing=spec["gradient_checkpointing"],
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
