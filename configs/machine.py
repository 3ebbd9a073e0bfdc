"""What this machine lacks, said before anything starts."""

import importlib.util
import math
import os
import shutil

from configs.errors import UserError
from configs.hardware import gpus
from configs.schema import Recipe
from configs.seats import seats


def check_machine(recipe: Recipe, *, vllm: bool, deepspeed: bool, actors: bool) -> None:
    """Raise UserError for a missing package or compiler, or, with `actors`, too few CPUs or GPUs for them."""
    asked = recipe.generator.resources.gpus + recipe.learner.resources.gpus
    extra, target = ("gpu", "make gpu") if asked else ("cpu", "make test")
    for package, needed in {"vllm": vllm, "deepspeed": deepspeed}.items():
        if needed and importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is not installed; type {target}, or pip install -e ".[{extra}]"')
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise UserError(
            f"no C++ compiler ({', '.join(compilers)}), and DeepSpeed builds with one; install it, "
            "for example apt-get install g++"
        )
    if actors and recipe.ray.address == "local":
        _check_capacity(recipe)


def _check_capacity(recipe: Recipe) -> None:
    there = {"cpus": os.cpu_count() or 1, "gpus": gpus()}
    for kind, available in there.items():
        asked = {seat.name: getattr(seat.resources, kind) for seat in seats(recipe)}
        total = math.fsum(asked.values())
        if total > available + 1e-9:
            shares = ", ".join(f"{name} {share:g}" for name, share in asked.items() if share)
            raise UserError(
                f"not enough {kind.upper()[:-1]}s: the actors ask for {total:g} ({shares}) and this machine has "
                f"{available}; lower *.resources.{kind} or replicas, or set ray.address to a cluster"
            )
