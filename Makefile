# Every target sets itself up: on a fresh clone, `make demo` is all there is to do.
#   PYTHON       the Python to build the environment with, 3.11 or newer
#   VENV         where the environment is built
#   JOBS         processes that run the tests, one thread each; each may take 1.5 GB of memory
#   PYTEST_ARGS  more arguments for pytest: make test PYTEST_ARGS='-x -k onnx'

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

STAMP := $(VENV)/.sepdeploy-installed

.PHONY: help demo test check clean

help:
	@echo "make demo    convert the digits network, with a report in demo/"
	@echo "make test    run all tests"
	@echo "make check   lint, formatting, types and import rules"
	@echo "make clean   remove what the others left behind, except the environment $(VENV)"

demo: $(STAMP)
	$(VENV)/bin/sepdeploy convert models/digits.pt --arch models.digits:digits_cnn --calibration calibration/digits.toml --validation calibration/digits.toml --calibration-images 256 --max-drop 1 --no-reconstruct --output demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadscope $(PYTEST_ARGS)

check: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find models calibration sepdeploy tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is younger than the files that say what to install, or the installation runs again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "sepdeploy needs Python 3.11 or newer, and '$(PYTHON)' is not; name one with PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "'$(PYTHON)' has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV): about 2.5 GB, a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tflite,test]'
	@touch $@
