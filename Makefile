# Each target works as the first command on a fresh clone: it makes .venv, installs what was tested, and runs.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: train test docs lab readme clean

train: .venv/ready          ## train the language model on builtin text, about three minutes
	enigma-lab train train_enigma

test: export OMP_NUM_THREADS ?= 1 # a process for each core
test: .venv/ready           ## every notebook, then tests/
	nbdev_test
	pytest -q --numprocesses auto --dist loadfile --durations 10

docs: .venv/ready           ## build the site and print its path
	enigma-lab docs

lab: .venv/ready            ## JupyterLab on the front page
	jupyter lab nbs/index.ipynb

readme: .venv/ready         ## README.md from nbs/index.ipynb
	python -c "from enigma_lab.dev.docs import write_readme; write_readme()"

.venv/ready: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	pip install --quiet --upgrade pip
	pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch .venv/ready

clean:                      ## what was built, not what was run
	rm -rf .venv _proc _docs build *.egg-info
