# Each target works as the first command on a fresh clone: it makes .venv, installs what was tested, and runs.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
# The commands of nbdev that ask for Quarto and would install it: in this .venv ours take their places.
QUARTO := nbdev_readme nbdev_docs nbdev_prepare nbdev_preview nbdev_install nbdev_install_quarto
# What was tested, pinned: for Python 3.11 and later, which the pins need.
CONSTRAINTS ?= $(shell $(PYTHON) -c "import sys; print('constraints.txt' if sys.version_info >= (3, 11) else '/dev/null')")
# A command that checks the cells that are generated from other files.
GENERATED ?= python -m enigma_lab.dev.parameters --check
# The suites of `make proof`; empty: all of them.
SUITES ?=

.PHONY: train check test proof stale tiers claims docs lab readme hooks clean

train: .venv/ready          ## train the language model on builtin text, about three minutes
	enigma-lab train train_enigma

check test proof: export OMP_NUM_THREADS ?= 1 # a process for each core
check: .venv/ready          ## in under a minute: export, clean, lint, imports, quick tests
	python -m enigma_lab.dev.proof check $(GENERATED)
	python -m enigma_lab.dev.docs --cells
	ruff check .
	pytest -q -m quick

test: .venv/ready           ## every notebook, then tests/ but for the proofs
	nbdev_test
	python -m enigma_lab.dev.proof notebooks
	pytest -q -m 'not proof' --numprocesses 3 --dist loadfile --durations 10

proof: .venv/ready          ## the long suites, each with a record in runs/proof/records.json
	python -m enigma_lab.dev.proof prove $(SUITES)

stale: .venv/ready          ## fails when code has changed since its proof
	python -m enigma_lab.dev.proof stale

tiers: .venv/ready          ## write tests/tiers.txt: what each tier runs
	pytest -q --collect-only --write-tiers tests

claims: .venv/ready         ## judge the documents' claims again, with fresh measurements: 10 minutes
	python -m enigma_lab.results.claims

docs: .venv/ready           ## build the site and print its path
	enigma-lab docs

lab: .venv/ready            ## JupyterLab on the front page
	jupyter lab nbs/index.ipynb

readme: .venv/ready         ## README.md, README_ZH.md and MODEL_CARD.md, from their pages
	python -c "from enigma_lab.dev.docs import write_readme; write_readme()"

hooks: .venv/ready          ## notebooks are merged cell by cell; the tree stays as it was
	nbdev_install_hooks

.venv/ready: settings.ini setup.py constraints.txt .ci/nbdev
	$(PYTHON) -m venv .venv
	pip install --quiet --upgrade pip
	pip install --quiet --constraint $(CONSTRAINTS) --editable '.[all]'
	for name in $(QUARTO); do install -m 755 .ci/nbdev $(BIN)/$$name; done
	touch .venv/ready

clean:                      ## what was built, not what was run
	rm -rf .venv _proc _docs build *.egg-info
