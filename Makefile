# make demo: the main job on this machine. make test: the tests. Both set up .venv first.
# make pi-check: a client in an emulated Raspberry Pi's userland (docs/devices.md); needs root and Debian.
# make fuzz: every decoder under a fuzzer, MINUTES=10 in all. make kills: a run with KILLS=50, beside one without.
# make soak: such runs behind bad links for MINUTES=60; needs mosquitto, as make kills does.

VENV := .venv
BIN := $(VENV)/bin
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
# The first that runs and is of a supported version; a name alone may be a shim for nothing.
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.10; do \
  $$name -c "$(SUPPORTED)" 2>/dev/null && echo $$name && break; done)

.PHONY: demo test check pi-check fuzz kills soak clean

demo: $(VENV)/ready
	$(BIN)/lamina run

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n logical --dist loadfile

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pi-check: $(VENV)/ready
	$(BIN)/python tests/pi/check.py

fuzz: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable ".[fuzz]"
	$(BIN)/python tests/fuzz/run.py --minutes $(or $(MINUTES),10)

kills: $(VENV)/ready
	$(BIN)/python tests/faults/kills.py --kills $(or $(KILLS),50) --seed $(or $(SEED),0)

soak: $(VENV)/ready
	$(BIN)/python tests/faults/soak.py --minutes $(or $(MINUTES),60)

$(VENV)/ready: pyproject.toml
	@$(or $(PYTHON),false) -c "$(SUPPORTED)" || { \
	  echo "Lamina needs Python 3.10 to 3.12: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[all,dev]"
	@touch $@

clean:
	rm -rf $(VENV) lamina-work dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
