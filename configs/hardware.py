"""What the machine that reads a recipe can do, told without torch."""

import os
from pathlib import Path

BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, arm


def gpus() -> int:
    """Return how many NVIDIA GPUs a process started here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def fast_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return bfloat16 where there are GPUs, or CPU instructions for it, else float32: emulated bfloat16 crawls."""
    if gpus():
        return "bfloat16"
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return "bfloat16" if flags & BF16_INSTRUCTIONS else "float32"
