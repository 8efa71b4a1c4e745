# `make serve` and `make test` do everything a fresh clone needs; `make help` lists the rest.
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
BIN := .venv/bin
INSTALLED := .venv/.installed

# Environment of Ray's processes (serve_app/commands/ray_environment.py says why).
export RAY_worker_niceness = 0
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S = 0.25
export RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH = cluster.termination:exit_on_sigterm
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH = serve_app.proxy_middleware:build_middlewares
export RAY_RUNTIME_ENV_PLUGINS = [{"class":"cluster.preload.PreloadPlugin"}]
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER = 0
export RAY_ROTATION_MAX_BYTES = 33554432
export RAY_ROTATION_BACKUP_COUNT = 2

.DEFAULT_GOAL := help
.PHONY: help install serve test quick check gate format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## create .venv and install the project into it

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# HOST counts only on the command line, because some shells set it.
serve: install  ## install, then serve CONFIG; PORT= and HOST= override it (default: http://127.0.0.1:8000)
	$(BIN)/relay serve $(CONFIG) $(if $(PORT),--port $(PORT)) $(if $(filter command,$(origin HOST)),--host $(HOST))

test: install  ## install, then run all tests, those that wait for Ray in parallel with the others
	$(BIN)/python -m pytest --numprocesses 3 --dist loadgroup --durations 25

quick: install  ## run the tests that need no torch, no Ray and no browser: about a minute
	$(BIN)/python -m pytest -q --quick --numprocesses 2 --dist loadgroup

check: install  ## run what CI runs first: ruff, mypy and the test of import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_arrows.py

gate: install  ## fail if one of a few speed ratios has become worse (docs/benchmarks.md)
	$(BIN)/relay bench gate

format: install  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and every cache
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info build
