# The paper's tables from a fresh clone: `make tables`. The tests: `make test`.
SCALE ?= toy
PY    ?= $(or $(shell command -v python3.11),$(shell command -v python3))
BIN   := .venv/bin
BATCH  = $(BIN)/snakemake --config scale=$(SCALE) $(if $(CONDITIONS),"conditions=$(CONDITIONS)") $(if $(SEEDS),"seeds=$(SEEDS)") --

, := ,

.DELETE_ON_ERROR:
.PHONY: help tables all many teachers publish test docs readme clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 18
	@echo "  variables: SCALE=$(SCALE) (smoke, toy, small, paper), CONDITIONS=C1,C4, SEEDS=0,1,2, PY=$(PY), MINUTES=9 and EVALUATE=false for many, ARGS for pytest"

tables: .venv/ok ## measure Table 1 and write the tables that need no training, under outputs/SCALE
	$(BATCH) tables

all: .venv/ok ## every table and figure: all seeds and budgets of the scale
	$(BATCH) all

many: .venv/ok ## the runs of all in one process, until MINUTES are over; then all makes the tables
	$(BIN)/python -c 'import sys, yaml; sys.tracebacklimit = 0; from heed_nb.batch import run_notebook; run_notebook("nbs/runs/many.ipynb", yaml.safe_load(sys.argv[1]))' \
	  '{scale: $(SCALE)$(if $(CONDITIONS),$(,) conditions: [$(CONDITIONS)])$(if $(SEEDS),$(,) seeds: [$(SEEDS)])$(if $(MINUTES),$(,) minutes: $(MINUTES))$(if $(EVALUATE),$(,) evaluate: $(EVALUATE))}'

teachers: .venv/ok ## train the toy teachers again (resumes)
	$(BATCH) teachers

publish: .venv/ok ## copy tables, figures and run records of outputs/SCALE to outputs/published/SCALE
	$(BIN)/python -c 'import sys; sys.tracebacklimit = 0; from heed_nb.results import publish; print(publish(sys.argv[1]))' $(SCALE)

test: .venv/ok ## run the tests
	$(BIN)/python -m pytest $(ARGS)

docs: .venv/ok ## build the documentation site in site/
	$(BIN)/python docs/build.py

readme: .venv/ok ## make README.md from nbs/index.ipynb
	$(BIN)/python docs/build.py --readme

clean: ## remove builds and what runs at SCALE wrote; published results and teachers stay
	rm -rf outputs/$(SCALE) .snakemake _proc site build dist *.egg-info

# One install at a time; an interrupted one is taken up again.
.venv/ok: settings.ini pyproject.toml setup.py
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "heed_nb needs Python 3.11 or later; this is %s. Name one: make PY=/path/to/python3.11" % sys.version.split()[0])'
	@mkdir -p .venv; echo "installing into .venv"
	@$(if $(shell command -v flock),flock -n -E 75 .venv/lock) sh -ec '\
	  $(PY) -m venv .venv; \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev,eval]"; \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps lmms-eval==0.7.3; \
	  touch $@' || { test $$? = 75 && echo "another make is installing into .venv; wait for it, then call again" >&2; exit 1; }
