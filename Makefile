# `make help` lists what there is. VENV=path uses another virtual environment.
VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
PG_TESTS := tests/core tests/ai tests/api tests/system/test_concurrency.py
# Files, numbers and processes, no database: once is enough.
NO_DB := $(wildcard tests/ai/test_containers*.py tests/ai/test_hostile*.py tests/ai/test_sandbox*.py \
  tests/ai/test_torch_*.py tests/ai/test_uncertainty*.py tests/ai/test_aggregation*.py tests/ai/test_drift.py \
  tests/ai/test_image_steps.py tests/ai/test_preprocessing.py tests/ai/test_received_memory.py \
  tests/ai/test_strategies.py tests/ai/test_strategies_conformance.py tests/ai/test_strategies_robust.py) \
  tests/api/test_hostile_uploads.py
SYSTEM := tests/system tests/demo tests/docs
# Programs in sandboxes, which see no database; what the rows of a question go through is in test_inference.py.
PROGRAMS := $(wildcard tests/api/test_inference_*.py tests/api/test_torch_*.py) tests/api/test_calibration.py \
  tests/api/test_model_statistics.py
# Pages for people, forms, and what has no rows or computes from them: the same on every database.
ONCE := tests/api/test_admin.py tests/api/test_errors.py tests/api/test_full_disk.py tests/api/test_update_forms.py \
  tests/api/test_malformed_updates.py tests/api/test_strategy_vectors.py tests/ai/test_strategies_rounds.py \
  tests/ai/test_plugins.py tests/api/test_plugin_trainings.py tests/ai/test_conformance_kit.py tests/ai/test_staleness.py \
  tests/core/test_killpoints.py tests/core/test_policy_sampling.py tests/core/test_registry.py

.DEFAULT_GOAL := help
.PHONY: help venv demo serve check test test-sqlite test-postgres test-files test-system test-heavy test-faults fuzz bench bench-server papers load docs fix clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

# Only our own .venv is made here; one that was given with VENV= is used as it is.
.venv/stamp: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, once: some minutes, about 2 GB."
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch .venv/stamp

ifeq ($(VENV),.venv)
venv: .venv/stamp
else
venv: $(PY)
endif

demo: venv ## train on this laptop: a server and its clients, about two minutes
	$(PY) -m demo

serve: venv ## the embedded server on http://127.0.0.1:8000, state in ./data
	$(PY) manage.py serve

check: venv ## everything but tests: style, types, imports, migrations, API schema, docs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	DJANGO_SETTINGS_MODULE=fl_server.settings.test $(PY) manage.py makemigrations --check --dry-run
	DJANGO_SETTINGS_MODULE=fl_server.settings.test $(PY) manage.py spectacular --validate --fail-on-warn --file /dev/null
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

test: venv ## all tests, three lanes side by side: SQLite; PostgreSQL, then what needs no database; real processes
	@logs=$$(mktemp -d); make="$(MAKE) --no-print-directory --keep-going VENV=$(VENV)"; \
	$$make test-postgres test-files > $$logs/a 2>&1 & a=$$!; $$make test-system > $$logs/b 2>&1 & b=$$!; \
	$$make test-sqlite; status=$$?; echo "Now what ran beside."; \
	wait $$a || status=1; cat $$logs/a; wait $$b || status=1; cat $$logs/b; rm -r $$logs; exit $$status

test-sqlite: venv ## what depends on the database, on SQLite
	$(PY) -m pytest $(addprefix --ignore=,$(NO_DB) $(SYSTEM))

test-system: venv ## real servers and processes, the demo, the examples of the documentation
	$(PY) -m pytest $(SYSTEM)

test-postgres: venv ## what depends on the database, on PostgreSQL
	FL_TEST_DB=postgres $(PY) -m pytest $(PG_TESTS) $(addprefix --ignore=,$(NO_DB) $(PROGRAMS) $(ONCE))

test-files: venv ## files, numbers and sandboxes, without a database
	$(PY) -m pytest $(NO_DB)

test-heavy: venv ## minutes and gigabytes, and a GPU where there is one
	$(PY) -m pytest -m "heavy or gpu"

test-faults: venv ## kill real processes 200 times; FAULTS=20 and SEED=7 for fewer, and the same again
	FL_FAULTS=$(or $(FAULTS),200) FL_FAULTS_SEED=$(SEED) $(PY) -m pytest -s -m faults tests/system/test_faults.py

fuzz: venv ## ten minutes of hostile files, guided by coverage; SECONDS=60 for less
	$(PY) -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(PY) -m tests.fuzz.containers -max_total_time=$(or $(SECONDS),600)

bench: venv ## ours beside flwr, nvflare and plain torch: 15 minutes, up to 10 GB of disk; QUICK=1: two
	$(PY) benchmarks/aggregation.py $(if $(QUICK),--quick,--docs)

bench-server: venv ## whole rounds, uploads and archives, as the documentation has them
	$(PY) benchmarks/rounds.py --server embedded
	$(PY) benchmarks/rounds.py --server production
	$(PY) benchmarks/upload.py
	$(PY) benchmarks/containers.py

papers: venv ## published results through a real server; PAPERS="P1 --data FOLDER" for some, and where the data lie
	$(PY) -m benchmarks.papers $(PAPERS)

load: venv ## 500 clients wait, 100 a round, 200 rounds; CLIENTS=60 SAMPLE=12 ROUNDS=5 SERVER=embedded for less
	$(PY) benchmarks/waiting.py --clients $(or $(CLIENTS),500) --sample $(or $(SAMPLE),100) \
	  --rounds $(or $(ROUNDS),200) --server $(or $(SERVER),production)

docs: venv ## HTML in docs/_build/html
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

fix: venv ## format, and repair what can be repaired
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove what was built or cached; data stays
	rm -rf .venv .bench-venv build dist fl_client/build fl_client/*.egg-info docs/_build docs/reference/_generated
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
