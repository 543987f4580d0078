# One command each: demo, test, lint, bench. Every target prepares what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := src/traceml/traces/native
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint bench native clean

$(VENV)/.base: pyproject.toml constraints.txt hatch_build.py $(wildcard $(NATIVE)/*.c)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing traceml with its demonstration into $(VENV) (once)"
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@$(PIP) install -c constraints.txt hypothesis ipykernel mlflow nbclient pandas playwright polars pytest pytest-timeout \
		setuptools tensorboardX -e ".[mlflow,wandb,clearml,aim,tensorboard,lightning,huggingface,ray,dask,web,parquet]"
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	@$(PIP) install -c constraints.txt mypy ruff types-psutil
	@touch $@

# The C library of an installed tree, after a change of its sources; installing builds it too (hatch_build.py).
native: $(NATIVE)/_native.so

$(NATIVE)/_native.so: $(wildcard $(NATIVE)/*.c)
	$(CC) -O3 -std=gnu11 -shared -fPIC -o $@.new $^ && mv $@.new $@

demo: $(VENV)/.base
	@$(BIN)/traceml demo

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.base
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) .bench build dist
