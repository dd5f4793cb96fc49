# EXTRAS adds install extras: make venv EXTRAS=cuda, EXTRAS=tpu, EXTRAS=cuda,hub. PYTHON chooses the interpreter.
PYTHON ?= python3
EXTRAS ?=
SIM ?= metaworld
comma := ,
space := $() $()
# What stands behind the config of the quickstart, as in configs/pi0_pusht.py:small,debug.
WORDS = $(subst $(space),$(comma),$(strip $(if $(filter pusht,$(SIM)),small) $(if $(SMOKE),debug)))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: venv quickstart test test-slow lint bench clean

venv: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "policymix needs Python >= 3.11; say which: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,sim,hub$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@

# SIM=pusht runs it on pictures; FRESH=1 starts over; SMOKE=1 takes a minute or two and learns nothing.
quickstart: venv
	$(BIN)/python experiments/quickstart.py --config=configs/pi0_$(SIM).py$(if $(WORDS),:$(WORDS)) \
	  --output=outputs/quickstart/$(SIM)$(if $(SMOKE),-smoke) $(if $(FRESH),--fresh)

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests

# The numbers of the original programs once more, on XLA's full optimisation: the code that users run.
test-slow: venv
	$(BIN)/python -m pytest -m slow tests
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n 2 --dist loadfile tests/models/pi0_test.py tests/mixing tests/checkpoints/streaming_test.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: venv
	$(BIN)/python experiments/benchmark.py

clean:
	rm -rf $(VENV) build outputs *.egg-info .pytest_cache .ruff_cache
