# `make` lists the targets. All of them work in .venv, which is made on first use from requirements/dev.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# -qq: errors only.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

.PHONY: venv
venv: $(STAMP) ## make .venv: the locked packages and qwen-rt itself, editable

$(STAMP): requirements/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; rerun with PYTHON=python3.11 (or newer)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/dev.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: demo
demo: $(STAMP) ## export, build and run the nano model that ships with qwen-rt
	$(BIN)/qwen-rt demo

.PHONY: test
test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: plugins
plugins: $(STAMP) ## build the CUDA kernels (needs nvcc 12.8 or newer, but no GPU)
	$(BIN)/python -m qwen_rt.plugins.build

# mypy cannot follow the hook of an editable install, so it gets the package as links: core/ is qwen_rt, the rest lies in it.
.PHONY: lint
lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types/qwen_rt
	@ln -s $(CURDIR)/core/* $(addprefix $(CURDIR)/,export runtime plugins benchmarks) build/types/qwen_rt/
	MYPYPATH=build/types $(BIN)/mypy -p qwen_rt

.PHONY: format
format: $(STAMP) ## rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: lock
lock: ## resolve requirements/dev.in anew into requirements/dev.lock
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip --disable-pip-version-check -qq install -r requirements/dev.in
	{ sed -n '/^#/!q;p' requirements/dev.lock; \
	  build/lock/bin/python -m pip freeze --all | grep -viE '^(pip==|qwen-rt )' | sed 's/+cpu$$//' | LC_ALL=C sort -f; } \
	  > build/lock/dev.lock
	mv build/lock/dev.lock requirements/dev.lock
	rm -rf build/lock

.PHONY: clean
clean: ## remove .venv and everything that was generated
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
