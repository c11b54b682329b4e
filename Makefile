PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
SCRIPTS := $(sort $(dir $(wildcard training/*.py eval/*.py benchmarks/*.py)))
THREADS := $(shell getconf _NPROCESSORS_ONLN)
# accelerate gives a process one thread unless it is told otherwise.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)
QUIET := TOKENIZERS_PARALLELISM=false TF_CPP_MIN_LOG_LEVEL=3

.PHONY: install quickstart test lint format clean

install: $(INSTALLED)

# The stamp is written last: an interrupted install leaves none, and the next one starts again.
$(INSTALLED): pyproject.toml
	@rm -f $@
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python >= 3.11 is needed, found {v[0]}.{v[1]}: make install PYTHON=...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	$(BIN)/python -m pip install torch torchvision
	$(BIN)/python -m pip install -e ".[train,dev]"
	@touch $@

quickstart: install
	$(QUIET) $(LAUNCH) training/pipeline.py --config training/configs/quickstart.yaml

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy modeling_villa datasets_scripts
	set -e; for folder in $(SCRIPTS); do $(BIN)/mypy $$folder; done

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
