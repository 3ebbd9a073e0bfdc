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
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "loss" in entry]
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    Path(out).write_text(json.dumps({"ends": clock.ends, "lengths": lengths, "versions": versions}))


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
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=spec["kl"],
        loss_type="dapo",  # one mean over all tokens of the batch, as aggregate: token
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
