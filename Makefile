# The paper's tables from a fresh clone: `make tables`. The tests: `make test`.
SCALE ?= toy
PY    ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3)
BIN   := .venv/bin
BATCH  = $(BIN)/python -m snakemake --config scale=$(SCALE) $(if $(CONDITIONS),"conditions=$$CONDITIONS") $(if $(SEEDS),"seeds=$$SEEDS") --
CALL  := $(BIN)/python -c 'import os, sys; sys.tracebacklimit = 0; from heed_nb.batch import *; exec(sys.argv[1])'

, := ,

# A scale is a file of workflow/scales. Variables are passed to commands in the environment, so that no shell expands them.
GIVEN := $(foreach name,SCALE CONDITIONS SEEDS MINUTES EVALUATE CONFIRM,$(if $(filter-out undefined,$(origin $(name))),$(name)))
$(foreach name,$(GIVEN),$(if $(findstring $$,$(value $(name))),$(error $(name) holds a dollar sign)))
$(foreach name,$(GIVEN),$(if $(strip $($(name))),,$(error $(name) is empty; leave it out$(,) or give one)))
SCALES := $(patsubst workflow/scales/%.yaml,%,$(wildcard workflow/scales/*.yaml))
$(if $(filter-out 1,$(words $(SCALE)))$(filter-out $(SCALES),$(SCALE)),$(error unknown scale '$(SCALE)'; one of $(SCALES)))
override SCALE := $(strip $(SCALE))
export PY SCALE

.DELETE_ON_ERROR:
.PHONY: help data data-check tables all many teachers publish test check format docs readme clean clean-runs

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20
	@echo "  variables: SCALE=$(SCALE) (of $(SCALES)), CONDITIONS=C1,C4, SEEDS=0,1,2, PY=$$PY, MINUTES=9 and EVALUATE=false for many, ARGS for pytest"

data: .venv/ok ## prepare the training data of a scale that names sources or a folder of yours (resumes)
	$(CALL) 'run_notebook("nbs/runs/prepare.ipynb", dict(scale=os.environ["SCALE"]))'

data-check: .venv/ok ## ask the hub for the files, columns and first rows of every source
	$(CALL) 'from heed_nb.corpora import check_sources; check_sources(load_scale(os.environ["SCALE"]).prepare.get("copies"))'

tables: .venv/ok ## measure Table 1 and write the tables that need no training, under outputs/SCALE
	$(BATCH) tables

all: .venv/ok ## every table and figure: all seeds and budgets of the scale
	$(BATCH) all

many: .venv/ok ## the runs of `all` in one process, for MINUTES; then `make all` writes the tables
	$(CALL) 'run_notebook("nbs/runs/many.ipynb", many_parameters(os.environ))'

teachers: .venv/ok ## train the toy teachers again; an interrupted training resumes
	$(BATCH) teachers

publish: .venv/ok ## copy tables, figures and run records of outputs/SCALE to outputs/published/SCALE
	$(CALL) 'publish_scale(os.environ["SCALE"])'

test: .venv/ok ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: format ## before a commit: format, export, and run the tests that are not slow
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

format: .venv/ok ## format notebooks and tests, and export the library
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format
	$(BIN)/nbdev-export

docs: .venv/ok ## build the documentation site in site/
	$(BIN)/python docs/build.py

readme: .venv/ok ## make README.md from nbs/index.ipynb
	$(BIN)/python docs/build.py --readme

clean: ## remove builds and keep the outputs of runs
	rm -rf .snakemake _proc site build dist *.egg-info

clean-runs: .venv/ok ## list the files that runs at SCALE wrote; with CONFIRM=SCALE, remove them
	$(CALL) 'remove_runs(os.environ["SCALE"], os.environ.get("CONFIRM", ""))'

LMMS_EVAL = $(shell sed -n 's/^LMMS_EVAL = "\(.*\)".*/\1/p' heed_nb/evaluate.py)

# Only one installation runs at a time. An interrupted installation is repeated at the next call.
.venv/ok: settings.ini pyproject.toml setup.py
	@"$$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "heed_nb needs Python 3.11 or later; this is %s. Name one: make PY=/path/to/python3.11" % sys.version.split()[0])'
	@mkdir -p .venv; echo "installing into .venv"
	@$(if $(shell command -v flock),flock -n -E 75 .venv/lock) sh -ec '\
	  "$$PY" -m venv .venv; \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev,eval,posttrain]"; \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps "lmms-eval==$(LMMS_EVAL)"; \
	  touch $@' || { test $$? = 75 && echo "another make is installing into .venv; wait for it, then call again" >&2; exit 1; }
