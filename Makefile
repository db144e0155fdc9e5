# The commands of this repository. `make` alone explains them.
#
# Given on the command line of make (never read from the environment variables around it):
#   ARGS="..."                what follows `pretrain train`, e.g. make train ARGS="story.txt --train.minutes 2"
#   TORCH=2.12.0              another release of torch than the one in constraints.txt, or
#   TORCH=path/to/torch.whl   a file; remembered in the environment until `make clean` or another TORCH
#   PIP_FLAGS="..."           passed on to `pip install`, e.g. another package index for a CPU build
#   VENV=DIR                  where the environment lies (default .venv)
#   SETUP_PYTHON=python3.12   the interpreter that makes the environment (default python3)
#   PYTHON=path/to/python     a prepared environment, used as it is: nothing is made or installed
#   TESTS=tests/test_x.py     what `make test` runs (default: the whole suite)
#   PEERS=FOLDER              checkouts of nanoGPT and litgpt that `make bench` measures next to ours
#   SHAKESPEARE=FILE          tinyshakespeare, a plain file, for `make bench`
#   WORKERS=8                 how many tests run side by side (default 2)

ARGS =
TORCH =
PIP_FLAGS =
VENV = .venv
SETUP_PYTHON = python3
PYTHON =
TESTS = tests
PEERS =
SHAKESPEARE =
WORKERS = 2

# One thread for each of the WORKERS: the wall clock is then the machine's, not the scheduler's, and
# tests that compare bits do not depend on how many cores happen to be free. No network, ever. What is drawn
# at random is drawn the same each time; pytest alone draws anew.
TEST_ENV = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 RAYON_NUM_THREADS=1 \
	HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONHASHSEED=0

ifeq ($(PYTHON),)
run = $(VENV)/bin/python
train_ready = $(VENV)/.train-stamp
dev_ready = $(VENV)/.dev-stamp
docs_ready = $(VENV)/.docs-stamp
else
run = PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
train_ready =
dev_ready =
docs_ready =
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-long faults-ci faults bench bench-full handover check docs format clean FORCE

help:
	@echo 'make train       train the default model on the bundled corpus (ARGS="..." changes that)'
	@echo 'make test        the whole suite, under 10 minutes on 2 cores'
	@echo 'make test-long   the tests that take minutes each'
	@echo 'make faults-ci   the fault suite: 10,000 kills and what docs/explanation/faults.md lists, 13 minutes on 2 busy cores'
	@echo 'make faults      the same with 500 bitwise resumes and 2,000 kills of the real train, under an hour'
	@echo 'make bench       speed next to transformers and PEERS, under 20 minutes; writes docs/explanation/benchmarks.md'
	@echo 'make bench-full  5 rounds, also compiled, to 1.55 nats, and on 2.5 GB of text (8 GB of disk)'
	@echo 'make handover    exported models in the tools that come after (TOOL=peft asks one again): writes docs/how-to/where-a-model-runs.md'
	@echo 'make check       ruff, format, strict types, spelling, import rules, private words, reference pages'
	@echo 'make docs        the documentation as a site in site/, its reference pages written again, links checked'
	@echo 'make format      lets ruff correct what it can'
	@echo 'make clean       removes the environment and all caches; runs/ stays'
	@echo
	@sed -n 's/^#   / /p' Makefile

train: $(train_ready)
	$(run) -m pretrain train $(ARGS)

test: $(dev_ready)
	$(TEST_ENV) $(run) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 10 -m "not slow" --hypothesis-seed 0 $(TESTS)

test-long: $(dev_ready)
	$(TEST_ENV) $(run) -m pytest --durations 0 -m slow --timeout 3600 $(TESTS)

faults-ci: $(dev_ready)
	export PYTHONPATH="$(CURDIR)/tests/helpers"; $(TEST_ENV) $(run) -m faults ci

faults: $(dev_ready)
	export PYTHONPATH="$(CURDIR)/tests/helpers"; $(TEST_ENV) $(run) -m faults full

bench_words = $(if $(PEERS),--peers "$(PEERS)") $(if $(SHAKESPEARE),--shakespeare "$(SHAKESPEARE)")

bench: $(dev_ready)
	$(run) benchmarks/everything.py $(bench_words)

bench-full: $(dev_ready)
	$(run) benchmarks/everything.py $(bench_words) --long --rounds 5

handover: $(dev_ready)
	$(run) scripts/handover.py $(TOOL)

check: $(dev_ready)
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(run) -m mypy
	$(run) -m codespell_lib
	$(run) -c 'from importlinter.cli import lint_imports_command as run; run()' --no-cache
	$(run) scripts/check_words.py
	$(run) scripts/make_reference.py --check

docs: $(docs_ready)
	$(run) scripts/make_reference.py
	NO_COLOR=1 $(run) -m zensical build --strict --config-file mkdocs.yml

format: $(dev_ready)
	$(run) -m ruff check --fix .
	$(run) -m ruff format .

clean:
	[ ! -e $(VENV)/.venv-stamp ] || rm -rf $(VENV)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# Two stamps in one environment: who wants to train does not download mypy and transformers.
# Each is touched last, so an installation that was interrupted is repeated.

$(VENV)/.venv-stamp:
	@$(SETUP_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'pretrain needs Python 3.11 or newer; name one: make SETUP_PYTHON=/path/to/python3.11' >&2; \
		exit 2; }
	[ -x $(VENV)/bin/pip ] || $(SETUP_PYTHON) -m venv $(VENV)
	@touch $@

# Rewritten only when TORCH changes, so that an unchanged one installs nothing anew.
$(VENV)/.torch: FORCE | $(VENV)/.venv-stamp
	@[ -e $@ ] || : > $@
	@if [ -n "$(TORCH)" ] && [ "$(TORCH)" != "$$(cat $@)" ]; then echo "$(TORCH)" > $@; fi

$(VENV)/constraints.txt: constraints.txt $(VENV)/.torch
	@torch=$$(cat $(VENV)/.torch); case "$$torch" in \
		'') cat constraints.txt > $@ ;; \
		*.whl) $(VENV)/bin/python -m pip install $(PIP_FLAGS) --force-reinstall --no-deps "$$torch" && \
			sed '/^torch==/d' constraints.txt > $@ ;; \
		*) sed "s/^torch==.*/torch==$$torch/" constraints.txt > $@ ;; \
	esac

$(VENV)/.train-stamp: pyproject.toml $(VENV)/constraints.txt
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml $(VENV)/constraints.txt
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.train-stamp

$(VENV)/.docs-stamp: pyproject.toml $(VENV)/constraints.txt
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@
