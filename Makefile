# make quickstart | test | lint | clean. Each sets up .venv by itself, once; the second time is quick.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint format clean lock dashboard

quickstart: $(VENV)/.run-ready
	$(BIN)/sae-ray train jobs/quickstart.yaml

test: $(VENV)/.dev-ready
	$(BIN)/python -m pytest

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Torch goes first and apart: pip takes the CPU build where one is configured, the default build elsewhere.
# Everything else comes from the complete lock, without looking at dependencies again.
$(VENV)/.run-ready: docker/requirements-cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "sae_ray needs Python 3.11 to 3.13; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps --require-hashes -r docker/requirements-cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev-ready: $(VENV)/.run-ready docker/requirements-dev.lock docker/requirements-triton.lock
	$(BIN)/pip install --quiet --no-deps --require-hashes -r docker/requirements-dev.lock
	$(BIN)/pip install --quiet --no-deps --require-hashes --upgrade --target $(VENV)/triton -r docker/requirements-triton.lock
	@touch $@

lock:
	docker/lock.sh

# Needs jq.
dashboard:
	jq -n -f cluster/grafana/dashboard.jq > cluster/grafana/dashboards/sae-ray.json

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
