# `make help` lists the targets. Everything but `help` and `clean` first makes sure that .venv is installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
AZURITE := $(CURDIR)/build/node_modules/.bin/azurite-blob

# For a machine without a GPU: https://download.pytorch.org/whl/cpu has torch without CUDA, 4 GB less.
TORCH_INDEX ?=

SPLITS ?= 1
ENGINE ?= local
CONFIG ?= yamls/tokenize/chameleon.yaml

.DEFAULT_GOAL := help
.PHONY: help install demo demo-llm test test-fast test-gpu test-cloud test-browser weights weights-open chaos bench-tokenize bench-stream bench-train bench-save bench-generate docs dist audit lint typecheck tokenize merge clean

help: ## Show the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Create .venv with everything in it (about 8 GB, torch brings CUDA); nothing to do when nothing changed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	@test -z '$(TORCH_INDEX)' || $(PIP_INSTALL) --index-url '$(TORCH_INDEX)' torch torchvision
	@$(PIP_INSTALL) --editable '.[demo,dev]'
	@touch $@

demo: install ## The whole job on real data, on a laptop: ends with demo/out/report.html and one line of figures
	@$(BIN)/python -m demo $(ARGS)

demo-llm: install ## A real language model learns to read and draw: SmolLM2-135M, 12 to 40 minutes on 2 cores; ends with build/demo-llm/report.html
	@$(BIN)/python -m demo.llm $(ARGS)

test: install ## All tests that need no GPU and no servers
	@$(BIN)/python -m pytest -q -m "not gpu and not cloud and not browser and not chaos"

test-fast: install ## The tests that take less than ten seconds each
	@$(BIN)/python -m pytest -q -m "not gpu and not slow and not cloud and not browser and not chaos"

test-gpu: install ## The tests that need a GPU: the reference's numbers in bf16, compiled attention, memory
	@CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest -q -m gpu

test-cloud: install $(AZURITE) ## The tests of S3, Google and Azure against servers on this machine (azurite needs npm)
	@AZURITE=$(AZURITE) $(BIN)/python -m pytest -q -m "cloud and not chaos"

$(AZURITE):
	@npm install --silent --no-audit --no-fund --prefix build azurite@3

test-browser: install ## The tests of pages in chromium, which is on PATH or at CHROMIUM=; SCREENSHOTS=docs/images makes the pictures anew
	@command -v "$${CHROMIUM:-chromium}" > /dev/null || \
		{ echo "error: the tests of pages need chromium: apt-get install chromium, or name it with CHROMIUM=" >&2; exit 2; }
	@$(BIN)/python -m pytest -q -m browser tests/pages

chaos: install $(AZURITE) ## The long forms of the tests that kill: 20,000 items, 50 SIGKILLs, Ray, three clouds, a disturbed training; about 55 minutes
	@AZURITE=$(AZURITE) $(BIN)/python -m pytest -q -m chaos --timeout 7200

bench-tokenize: install ## How fast the tokenizer is, against the reference's loop; the last line is one JSON object
	@$(BIN)/python -m benchmarks.tokenizing $(ARGS)

bench-stream: install ## How fast samples come from disk, and what a plan costs, against others; the last line is one JSON object
	@$(BIN)/python -m benchmarks.streaming $(ARGS)

bench-train: install ## What a training step costs: counted for the shipped stages, measured against others; the last line is one JSON object
	@$(BIN)/python -m benchmarks.training $(ARGS)

bench-save: install ## How long a save stops training, against whole files; the last line is one JSON object
	@$(BIN)/python -m benchmarks.saving $(ARGS)

bench-generate: install ## How fast images are drawn, against transformers' generate; the last line is one JSON object
	@$(BIN)/python -m benchmarks.generating $(ARGS)

docs: install ## The documentation as a site, in build/docs/index.html
	@$(BIN)/python docs/write_settings.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'build/docs; to read it with its search: python3 -m http.server --bind 127.0.0.1 --directory build/docs'

dist: install ## Build dist/*.tar.gz, and of it dist/*.whl
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .

audit: install ## Known vulnerabilities of the pinned dependencies, by PyPI's database (needs the network)
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

lint: install ## ruff: style and common mistakes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# Type checkers do not follow the import hook of an editable install: a link is enough for them.
typecheck: install ## mypy: strict for what is imported and run, with types everywhere for the tests
	@mkdir -p build/types && ln -sfn ../.. build/types/unitoken
	@$(BIN)/mypy -p unitoken.common -p unitoken.storage -p unitoken.dataset -p unitoken.codec -p unitoken.streaming_data -p unitoken.tokenize -p unitoken.generation -p unitoken.train -p unitoken.commands -p unitoken.quickstart -p demo -p benchmarks
	@$(BIN)/mypy --config-file tests/mypy.ini tests

tokenize: install ## Conversations -> dataset folder: make tokenize SPLITS=8 IN=items.json OUT=folder [CONFIG=...] [ENGINE=ray] [ARGS="key=value ..."]
	@test -n "$(IN)" -a -n "$(OUT)" || { echo "error: make tokenize needs IN=items.json and OUT=folder" >&2; exit 2; }
	@$(BIN)/unitoken tokenize --config $(CONFIG) --splits $(SPLITS) --engine $(ENGINE) --in-filename "$(IN)" --out-dir "$(OUT)" $(ARGS)

merge: install ## Chunks -> one index.json, after workers that were started one by one: make merge OUT=folder
	@test -n "$(OUT)" || { echo "error: make merge needs OUT=folder" >&2; exit 2; }
	@$(BIN)/unitoken merge --out-dir "$(OUT)"

weights: install ## Fetch Lumina-mGPT-7B-512 and SigLIP into weights/ (about 18 GB, needs a network)
	@$(BIN)/unitoken weights chameleon

weights-open: install ## Fetch Qwen3-0.6B, Janus' image tokenizer and a SigLIP into weights/ (about 6 GB, needs a network)
	@$(BIN)/unitoken weights open

clean: ## Remove what the targets made; data that you tokenized stays
	rm -rf $(VENV) build *.egg-info demo/out .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
