# Everything a developer or CI runs. `make` alone prints this help.
#
# Settings: PYTHON=python3.11 (makes .venv), PLATFORM=cpu|cuda (default: cuda where `nvidia-smi -L` works, else cpu).

PYTHON ?= python3
ifndef PLATFORM
PLATFORM := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif

REQUIREMENTS := requirements/$(PLATFORM).txt requirements/dev.txt
# One stamp per content of what decides the environment: a second set-up finds it and does nothing.
STAMP := .venv/.installed-$(PLATFORM)-$(shell cat $(REQUIREMENTS) pyproject.toml kv_transfer/native.c router/block_probe.c 2>/dev/null | sha256sum | cut -c1-16)
IS_311 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'
BIN := .venv/bin
COVERAGE := build/coverage
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Pure files are covered by the first three; the last do without, since being traced takes them twice as long.
COVERING := property unit sim
QUICK_TESTS := $(wildcard tests/contract tests/packaging)
INTEGRATION_TESTS := $(wildcard tests/integration/test_*.py)
# Those that start whole platforms, and those that run what a user types: both wait for processes most of the time.
PLATFORM_TESTS := $(addprefix tests/integration/test_,platform.py nodes.py kv_tiers.py deaths.py)
COMMAND_TESTS := $(addprefix tests/integration/test_,up.py demo.py chaos.py cli.py top.py simulated_up.py prometheus.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick platforms commands parts lint unit integration prometheus proto wheel clean

help:  ## print this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install the pinned requirements and this project into it

$(STAMP):
	@case "$(PLATFORM)" in cpu|cuda) ;; *) echo "error: PLATFORM must be cpu or cuda, not $(PLATFORM)" >&2; exit 1;; esac
	@$(PYTHON) $(IS_311) || { echo "error: $(PYTHON) is not CPython 3.11; name one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@for stamp in .venv/.installed-*; do case "$$stamp" in *'*'|.venv/.installed-$(PLATFORM)-*) ;; \
	  *) echo "setup: .venv was made for another platform, making it anew for $(PLATFORM)"; rm -rf .venv; break;; esac; done
	@test ! -x $(BIN)/python || $(BIN)/python $(IS_311) || { echo "setup: .venv is not of Python 3.11, making it anew"; rm -rf .venv; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "setup: creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "setup: installing $(REQUIREMENTS) (some minutes and gigabytes the first time)"
	@$(PIP) install --quiet --no-deps $(addprefix -r ,$(REQUIREMENTS)) || { echo "error: the install failed." \
	  "If torch was not found, point PIP_EXTRA_INDEX_URL at PyTorch's CPU index" >&2; exit 1; }
	@echo "setup: installing this project, editable"
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@rm -f .venv/.installed-* && touch $@
	@echo "setup: done"

demo: setup  ## start the whole platform on the bundled model, send prompts, check every token, stop
	@$(BIN)/python -m tandem.demo --json build/demo.json

test: lint prometheus  ## what CI runs: lint, types, all tests, and full branch coverage of the pure files
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(addprefix covering-,$(COVERING)) quick
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=target platforms commands parts
	$(BIN)/python -m coverage combine --keep --quiet $(addprefix $(COVERAGE)/,$(COVERING))
	$(BIN)/python -m coverage report --include="$$(paste -sd, tests/pure_files.txt)" --fail-under=100 --show-missing --skip-covered

# Side by side: these compute and start little ...
covering-%: setup
	COVERAGE_FILE=$(COVERAGE)/$* $(BIN)/python -m pytest -o cache_dir=build/$*_cache --cov --cov-report= tests/$*

quick: setup
	$(BIN)/python -m pytest -o cache_dir=build/quick_cache $(QUICK_TESTS)

# ... and these wait for processes.
platforms: setup
	$(BIN)/python -m pytest --durations=15 $(PLATFORM_TESTS)

commands: setup
	$(BIN)/python -m pytest -o cache_dir=build/commands_cache --durations=15 $(COMMAND_TESTS)

parts: setup
	$(BIN)/python -m pytest -o cache_dir=build/parts_cache --durations=15 $(filter-out $(PLATFORM_TESTS) $(COMMAND_TESTS),$(INTEGRATION_TESTS))

lint: setup  ## formatting, lint rules and types
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

unit: setup  ## the unit tests alone
	$(BIN)/python -m pytest tests/unit

integration: setup prometheus  ## the tests with the real parts alone
	$(BIN)/python -m pytest tests/integration

# Where it cannot be had the tests that need it fail and say so, after all others have had their turn.
prometheus:  ## fetch Debian's Prometheus into build/ for the tests, where none is on PATH
	@{ command -v prometheus && command -v promtool; } >/dev/null || deploy/prometheus/fetch build/prometheus || true

proto: setup  ## generate tandem/v1 from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. proto/tandem/v1/*.proto

wheel: setup  ## build dist/*.whl
	rm -rf build/lib build/bdist.*
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove what builds and tests leave; .venv stays
	rm -rf build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs -r rm -rf
