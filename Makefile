# One command each: demo, check, test, frameworks, lint, docs, bench, accuracy, faults, soak, fuzz, audit, release, compatibility.
# Every target prepares what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := src/traceml/traces/native src/traceml/instrument/native
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest
# Files start in the order of tests/conftest.py. Workers wait for processes half of the time.
SHARE  := --dist loadgroup --no-loadscope-reorder
JOBS   ?= $(shell expr $$(nproc) + 2)

.PHONY: demo check test frameworks lint types style unit system docs bench accuracy faults soak fuzz audit release compatibility clean

$(VENV)/.base: pyproject.toml constraints.txt hatch_build.py src/traceml/database/schema.py $(wildcard $(NATIVE:=/*.[ch]))
	@test -x $(BIN)/python || $(PYTHON) tests/system.py install venv
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing traceml with its demonstration into $(VENV) (once)"
	@$(PIP) install --upgrade 'pip>=25.1'  # reads dependency groups
	@$(PIP) uninstall --yes traceml 2>/dev/null || true  # the name of earlier checkouts
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "installing what the tests need into $(VENV) (once)"
	@$(PIP) install -c constraints.txt --group test -e .
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	@$(PIP) install -c constraints.txt --group lint
	@touch $@

demo: $(VENV)/.base
	@$(BIN)/traceml demo

# Lint, types, and every test that starts no process, without the longest.
check: $(VENV)/.test $(VENV)/.lint
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint unit

unit: $(VENV)/.test
	$(PYTEST) -q -n $$(( $$(nproc) + 1 )) $(SHARE) -m "not process and not long" $(ARGS)

# Everything, after the system packages that the tests need (tests/system.py).
test: system $(VENV)/.test
	$(PYTEST) -n $(JOBS) $(SHARE) -m "not alone and not frameworks" $(ARGS)
	$(PYTEST) -m alone $(ARGS) || [ $$? = 5 ]  # 5: ARGS select none of them

# TRL and DeepSpeed, in an environment of their own: TRL changes what transformers imports, and DeepSpeed compiles.
frameworks: system
	@$(PYTHON) -m venv build/frameworks
	@build/frameworks/bin/python -m pip install --quiet 'pip>=25.1'
	@build/frameworks/bin/python -m pip install --quiet -c constraints.txt --group test -e . trl deepspeed ninja
	build/frameworks/bin/python -m pytest -m frameworks tests/integrations $(ARGS)

system:
	@$(PYTHON) tests/system.py install

lint: style types

# Without ruff's cache, which does not see that a module was renamed elsewhere.
style: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --no-cache .

types: $(VENV)/.lint
	$(BIN)/mypy

# The site, in build/site; `make test` builds it too. A link that leads nowhere fails it.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html; for its search: $(BIN)/python -m http.server -d build/site"

# Draws docs/images again, from demonstrations. Needs Chromium and a quiet machine.
pictures: system $(VENV)/.test
	@$(PIP) install --group pictures
	$(BIN)/python docs/images/terminal_pictures.py
	$(BIN)/python docs/images/page_pictures.py

$(VENV)/.docs: $(VENV)/.base
	@$(PIP) install -c constraints.txt --group docs
	@touch $@

bench: $(VENV)/.base
	$(BIN)/python benchmarks/run.py $(ARGS)

# Real trainings, judged; writes docs/accuracy.md. Needs a quiet machine and nearly an hour.
accuracy: $(VENV)/.test
	$(BIN)/python benchmarks/accuracy/judge.py --output docs/accuracy.md $(ARGS)

# Every process and part of the system disturbed, in real trainings; writes docs/faults.md. As root: an hour.
faults: system $(VENV)/.test
	$(BIN)/python benchmarks/faults/faults.py --output docs/faults.md $(ARGS)

# An hour of runs that come and go, torn connections and a killed aggregator; ARGS="--minutes 2" is two minutes.
soak: $(VENV)/.test
	$(BIN)/python benchmarks/faults/soak.py $(ARGS)

# Generated input and killed writers of stores, with new seeds; prints the counts and the smallest input that fails.
fuzz: $(VENV)/.test
	$(BIN)/python benchmarks/faults/fuzz.py $(ARGS)

# Licenses of all dependencies (release/licenses.toml), and known vulnerabilities where OSV can be reached.
audit: $(VENV)/.test
	@$(PIP) install --group audit
	$(BIN)/python release/audit.py $(ARGS)

# What a registry takes, in dist: source distribution and wheel, each tried in an empty environment. Five minutes.
release: $(VENV)/.release
	$(BIN)/python release/build.py $(ARGS)

# The wheel with each Python and the oldest and newest torch; writes docs/compatibility.md. 30 GB of disk.
compatibility: $(VENV)/.release
	$(BIN)/python release/compatibility.py --output docs/compatibility.md $(ARGS)

$(VENV)/.release: $(VENV)/.base
	@$(PIP) install --group release
	@touch $@

clean:
	rm -rf $(VENV) .bench build dist
