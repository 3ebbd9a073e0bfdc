"""The order of imports, the homes of heavy packages, the sizes of files and functions, and how light a command is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("configs", "trainers", "actors", "cluster")
HOMES = {
    "vllm": {"actors/vllm_engine.py", "actors/weight_sync.py"},
    "deepspeed": {"trainers/engine.py"},
    "mlflow": {"trainers/tracking.py", "trainers/tracked.py"},
}
NEVER = {"configs": {"torch", "ray", "vllm", "transformers"}, "trainers": {"ray", "vllm"}}
HEAVY = ("torch", "ray", "vllm", "deepspeed", "mlflow", "transformers", "datasets", "pandas", "pyarrow")
LIGHT = "trainers/mismatch/"  # statistics for any table of numbers, without a trainer
MAX_FILE, MAX_FUNCTION = 400, 60

SOURCES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))
ALL = SOURCES + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_one_way_and_heavy_packages_stay_at_home(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tops = {module.split(".")[0] for module in imported(ast.parse(path.read_text(encoding="utf-8")))}
    assert not tops & set(ORDER[ORDER.index(package) + 1 :]), "imports a package to its right"
    assert not tops & {"tests", "benchmarks"}
    assert not tops & NEVER.get(package, set())
    assert {heavy for heavy, homes in HOMES.items() if name(path) not in homes}.isdisjoint(tops)
    assert not name(path).startswith(LIGHT) or tops.isdisjoint(HEAVY)


@pytest.mark.parametrize("path", ALL, ids=name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno + 1 > MAX_FUNCTION]
    assert not long


@pytest.mark.parametrize(("module", "heavy"), [("cluster.__main__", HEAVY), ("cluster.launch", ("vllm",))])
def test_a_light_command_imports_nothing_heavy_and_the_driver_no_vllm(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(m for m in {heavy} if m in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
