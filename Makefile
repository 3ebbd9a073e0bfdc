# make demo | test | check | smollm2 | instrument | gpu | clean
PYTHON ?= python3.11
VENV ?= .venv
# Where torch's CPU build comes from: empty asks pip's configured index. On a machine whose index serves the CUDA
# build under the plain name, give the PyTorch project's CPU index: make demo TORCH_INDEX=<its URL>.
TORCH_INDEX ?=
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
STAMP := $(VENV)/.cpu
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test check smollm2 instrument gpu clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/headroom demo

test: $(STAMP)
	$(BIN)/python -m pytest -q

check: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy configs trainers

smollm2: $(STAMP)
	$(BIN)/python -m cluster.fetch_smollm2

# The tables of docs/results/instrument.md, about an hour of two cores.
instrument: $(STAMP)
	mkdir -p runs/instrument
	$(BIN)/python -m benchmarks.instrument --runs 4000 --out runs/instrument/alarm.csv > runs/instrument/alarm.md
	$(BIN)/python -m benchmarks.selection --processes 2 --out runs/instrument/selection
	$(BIN)/python -m benchmarks.forecast --out runs/instrument/forecast > runs/instrument/forecast.md
	$(BIN)/python -m benchmarks.coverage --out runs/instrument/coverage > runs/instrument/coverage.md
	$(BIN)/python -m benchmarks.early > runs/instrument/early.md

$(STAMP): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "headroom: error: $(PYTHON) not found; install Python 3.11 or set PYTHON=" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	  echo "headroom: error: no C++ compiler; DeepSpeed builds its communication op with one (Debian: apt-get install g++)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep '^torch==' $(LOCK) > $(VENV)/torch.txt
	$(BIN)/python -m pip install -q --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r $(VENV)/torch.txt
	@build=$$($(BIN)/python -c "import importlib.metadata as m; print(m.version('torch'))"); case $$build in *+cpu) ;; *) \
	  echo "headroom: error: torch $$build is not the CPU build; type make TORCH_INDEX=<the PyTorch project's CPU index>" >&2; exit 2;; esac
	$(BIN)/python -m pip install -q --no-deps setuptools==78.1.1 wheel ninja packaging
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -r $(LOCK)
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $(STAMP)

gpu:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[gpu,dev]"

clean:
	rm -rf $(VENV) .cache runs mlflow.db
