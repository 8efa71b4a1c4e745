# `make serve` and `make test` do everything a fresh clone needs; `make help` lists the rest.
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
BIN := .venv/bin
INSTALLED := .venv/.installed

# What Ray's processes are to know from whoever starts them (serve_app/ray_environment.py says why).
export RAY_worker_niceness = 0
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S = 0.25
export RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH = cluster.termination:exit_on_sigterm
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH = serve_app.proxy_middleware:build_middlewares
export RAY_RUNTIME_ENV_PLUGINS = [{"class":"cluster.preload.PreloadPlugin"}]
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER = 0
export RAY_ROTATION_MAX_BYTES = 33554432
export RAY_ROTATION_BACKUP_COUNT = 2

.DEFAULT_GOAL := help
.PHONY: help install serve test check format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install the project into it

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# HOST of the command line alone: some shells have one of their own.
serve: install  ## install, then serve CONFIG; PORT= and HOST= instead of what it says (http://127.0.0.1:8000)
	$(BIN)/relay serve $(CONFIG) $(if $(PORT),--port $(PORT)) $(if $(filter command,$(origin HOST)),--host $(HOST))

test: install  ## install, then run the tests, those on the Ray cluster beside the others
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --durations 25

check: install  ## what CI runs first: ruff, mypy and the import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_arrows.py

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and every cache
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info build
